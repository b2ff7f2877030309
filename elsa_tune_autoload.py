"""What torch calls when it is imported (entry point group torch.backends): ELSA_TUNE=1 enables elsa-tune in any program, and
ELSA_TUNE_RECORD=FILE lets it write down what the program asks.

A module of its own that imports os and sys alone: everybody who has the package installed waits for it, and torch ends where it raises.
"""

import os
import sys

OPERATORS = ("attend", "decide", "torchs")
"""With torch's own operator's arguments: what compiled programs call in its place, and whom the extension asks what it does not know, and
what torch's own kernel refuses, for the reason."""

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0.0, bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None)"
    " -> (Tensor output, Tensor logsumexp)"
)
_declared: dict[str, object] = {}


def load() -> None:
    """Tell torch who we are, and enable the override if the environment asks for it. Whatever goes wrong then is one line on stderr, and
    torch serves."""
    is_served = os.environ.get("ELSA_TUNE", "").lower() not in ("", "0", "false", "no", "off")
    is_asked = (
        is_served or bool(os.environ.get("ELSA_TUNE_RECORD"))
    ) and "elsa_tune.shell" not in sys.modules  # elsa-tune's own commands
    try:
        register()
        declare("attend")
        if is_asked:
            Enabled()
    except BaseException as error:  # not even an exit may come out of here
        if is_asked:
            told = f"elsa-tune is not enabled, torch serves: {type(error).__name__}: {error}\n"
            os.write(2, told.encode(errors="replace"))


def register() -> None:
    """Be an implementation that torch.nn.attention.activate_flash_attention_impl("ELSA") knows, in a torch that knows any (2.10)."""
    from torch.nn import attention  # which torch has loaded

    if hasattr(attention, "register_flash_attention_impl"):
        attention.register_flash_attention_impl("ELSA", register_fn=Enabled)


def declare(*names: str) -> None:
    """Declare operators of ours: the first, so that programs compiled while elsa-tune was enabled can be loaded while it is not. Only calling
    one imports elsa-tune."""
    import torch

    for name in names:
        if name not in _declared:
            _declared[name] = library = torch.library.Library("elsa_tune", "FRAGMENT")
            library.define(name + _SCHEMA)
            library.impl(name, _torchs if name == "torchs" else _answer, "CPU", with_keyset=True)


def _answer(keys, *arguments, **named):
    from elsa_tune.integrations import override

    return override.decide(keys, *arguments, **named)


def _torchs(keys, *arguments, **named):
    from elsa_tune.integrations import override

    return override.by_torch(keys, *arguments, **named)


class Enabled:
    """The override, enabled until remove(), unless it was enabled before."""

    def __init__(self):
        from elsa_tune.integrations import override

        self._was_on = override.is_on()
        override.enable()

    def remove(self):
        """Disable it."""
        from elsa_tune.integrations import override

        if not self._was_on:
            override.disable()
