"""A page that stands alone: no script, nothing fetched, one stylesheet, all text escaped.

Owns the frame of every page and its pieces. The stylesheet is named by its digest in the page's own
content security policy. Must not know what a page is about.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body{font:15px/1.5 sans-serif;color:#222;max-width:1040px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:0}
h2{font-size:1.2em;margin:2em 0 .3em;border-bottom:1px solid #ccc}
h3{font-size:1em;margin:1.3em 0 .2em}p{margin:.4em 0}
table{border-collapse:collapse;margin:.6em 0}caption{text-align:left;color:#555;font-size:.9em}
th,td{padding:.2em .7em;border-bottom:1px solid #e4e4e4;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}td:not(:first-child){white-space:nowrap}
th{border-bottom:2px solid #999;font-weight:600}.note{color:#555;font-size:.9em}
ul{margin:.4em 0;padding-left:1.4em}
svg{max-width:100%;height:auto;display:block}.scroll{overflow-x:auto}
""".strip()
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CSP = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"


def frame(title: str, subtitle: str, sections: Iterable[Iterable[str]]) -> str:
    """The whole page; each section is the pieces that it is made of."""
    body = "".join(f"<section>{''.join(section)}</section>" for section in sections)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p>{body}</body></html>'
    )


def heading(text: str, level: int = 2) -> str:
    """A heading of a section (2), or inside one (3)."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph in small type."""
    return f'<p class="note">{escape(text)}</p>'


def bullets(texts: Iterable[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; its first column is words, the others are figures."""
    first = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def megabytes(size: float) -> str:
    """Bytes in MB."""
    return f"{size / 1e6:,.3f}"
