"""What torch calls when it is imported (entry point group torch.backends): ELSA_TUNE=1 enables elsa-tune in any program.

A module of its own that imports os alone: everybody who has the package installed waits for it, and torch ends where it raises.
"""

import os


def load() -> None:
    """Tell torch who we are, and enable the override if the environment asks for it. Whatever goes wrong is one line on stderr, and torch
    serves."""
    try:
        register()
        if os.environ.get("ELSA_TUNE", "0") not in ("", "0"):
            Enabled()
    except BaseException as error:  # not even an exit may come out of here
        os.write(
            2, f"elsa-tune is not enabled, torch serves: {type(error).__name__}: {error}\n".encode(errors="replace")
        )


def register() -> None:
    """Be an implementation that torch.nn.attention.activate_flash_attention_impl("ELSA") knows, in a torch that knows any (2.10)."""
    from torch.nn import attention  # which torch has loaded

    if hasattr(attention, "register_flash_attention_impl"):
        attention.register_flash_attention_impl("ELSA", register_fn=Enabled)


class Enabled:
    """The override, enabled until remove()."""

    def __init__(self) -> None:
        from elsa_tune.integrations import override

        override.enable()

    def remove(self) -> None:
        """Disable it."""
        from elsa_tune.integrations import override

        override.disable()
