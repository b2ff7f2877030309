"""Signatures of exported files: OpenSSH's own, so that anyone's key serves."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from elsa_tune import places
from elsa_tune.errors import BadMeasurements, NotTrusted
from elsa_tune.remember import settings
from elsa_tune.remember.fetch import fetched

NAMESPACE = "elsa-tune"
"""What a signature is for, as ssh-keygen -Y keeps apart."""

MOST_BYTES = 1 << 16
"""Of a signature."""


def sign(path: Path, key: Path) -> Path:
    """Sign a file with an OpenSSH key; the signature lies beside it. Raises NotTrusted."""
    target = path.with_name(path.name + ".sig")
    target.unlink(missing_ok=True)
    _ssh_keygen(["-Y", "sign", "-q", "-n", NAMESPACE, "-f", str(key), str(path)], f"{path} cannot be signed with {key}")
    return target


def check_signature(source: str, path: Path) -> None:
    """Whether one of the trusted signed what lies at ``path``; its signature lies beside ``source``. Raises NotTrusted."""
    with tempfile.TemporaryDirectory() as folder:
        signers = Path(folder) / "signers"
        signers.write_text("".join(f'* namespaces="{NAMESPACE}" {key}\n' for key in settings.trusted()))
        remedy = f"{source} is not signed by anyone on the trusted list in {places.settings().name}"
        try:
            with fetched(f"{source}.sig") as signature:
                content = signature.read_bytes()
        except (BadMeasurements, OSError) as error:
            raise NotTrusted(f"{remedy}: {error}; ask for its .sig file, or empty the list") from error
        (Path(folder) / "signature").write_bytes(content[:MOST_BYTES])
        who = ["-I", NAMESPACE, "-n", NAMESPACE, "-s", str(Path(folder) / "signature")]
        _ssh_keygen(["-Y", "verify", "-q", "-f", str(signers), *who], remedy, path)


def _ssh_keygen(arguments: list[str], trouble: str, given: Path | None = None) -> None:
    try:
        with given.open("rb") if given else open(os.devnull, "rb") as stdin:
            subprocess.run(["ssh-keygen", *arguments], stdin=stdin, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise NotTrusted(f"{trouble}: ssh-keygen is missing; install OpenSSH") from error
    except subprocess.CalledProcessError as error:
        raise NotTrusted(f"{trouble}: {(error.stderr or error.stdout).strip()[:300]}") from error
