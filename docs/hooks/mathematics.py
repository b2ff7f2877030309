"""Formulas: TeX between dollars becomes MathML as a page is built, which browsers draw without a script; forges draw the dollars."""

from __future__ import annotations

import html as entities
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S)


def _drawn(found: re.Match[str]) -> str:
    tex = entities.unescape(found["tex"]).strip()
    return f'<div class="formula">{convert(tex, display="block")}</div>' if found["tag"] == "div" else convert(tex)


def on_page_content(html: str, **_: Any) -> str:
    """What pymdownx.arithmatex found in a page."""
    return FORMULA.sub(_drawn, html)
