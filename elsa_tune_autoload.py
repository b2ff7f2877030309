"""What torch imports at its own import (entry point group torch.backends): enables elsa-tune where ELSA_TUNE=1 asks for it.

A module of its own that imports os alone: torch stops where such a module raises, and everybody who has the package installed waits.
"""

import os


def enable() -> None:
    """Enable the override if the environment asks for it. Whatever goes wrong is one line on stderr, and torch serves."""
    if os.environ.get("ELSA_TUNE", "0") in ("", "0"):
        return
    try:
        from elsa_tune.integrations import override

        override.enable()
    except BaseException as error:  # not even an exit may come out of here
        os.write(2, f"elsa-tune is not enabled, torch serves: {type(error).__name__}: {error}\n".encode())
