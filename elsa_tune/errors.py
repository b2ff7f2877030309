"""One class per mistake; every message ends with what to do next."""


def shown(value: object) -> str:
    """A value as a message shows it: one line, short, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of thousands of digits has no repr; others' classes may raise anything
        return f"of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


class ElsaTuneError(Exception):
    """Anything this package raises on purpose."""


class BadProblem(ElsaTuneError, ValueError):
    """A problem is misspelled or impossible."""


class BadVariant(ElsaTuneError, ValueError):
    """A variant is misspelled, or names a value its search space does not have."""


class BadDevice(ElsaTuneError, ValueError):
    """A device is misspelled or not on this machine."""


class BadWorkload(ElsaTuneError, ValueError):
    """A workload file is missing or malformed."""


class HookMissing(ElsaTuneError):
    """This torch has no way by which its operator can be answered by others: enable() needs 2.9 or later."""


class CompilerMissing(ElsaTuneError):
    """No compiler for generated code was found."""


class BuildFailed(ElsaTuneError):
    """The compiler rejected generated code."""


class KernelCacheUnsafe(ElsaTuneError):
    """The kernel cache holds something that this user alone could not have put there."""


class DatabaseUnusable(ElsaTuneError):
    """The measurement database cannot be used: corrupt, locked, read-only, full, or from a newer version."""


class BadSettings(ElsaTuneError, ValueError):
    """The settings file, what it names, or an environment variable is not understood."""


class NotTrusted(ElsaTuneError):
    """A signature is missing, wrong, or by nobody on the list of the trusted."""


class FleetUnreachable(ElsaTuneError):
    """The storage that a fleet shares does not answer, or what speaks to it is not installed."""


class FolderTaken(ElsaTuneError):
    """A folder to be written, as a kit's, holds something else."""


class NoRoom(ElsaTuneError, OSError):
    """A folder has no room for the keys and values of an OffloadedCache, or may not be written to."""


class BadMeasurements(ElsaTuneError, ValueError):
    """A file of measurements cannot be read, or holds none that this version understands."""


class KernelMissing(ElsaTuneError, LookupError):
    """No kernel serves this problem on this device: load() cannot build or trust one, or kit, export or show has none to write."""


class WrongArguments(ElsaTuneError, ValueError, RuntimeError):
    """An argument of a call does not fit; the message names it, what it is (of a tensor dtype and shape) and what was expected. A
    ValueError and a RuntimeError: torch raises now one, now the other."""
