"""Recognise what a web server sends in place of a file: a login page, an error, a Git LFS pointer."""

from __future__ import annotations

import html
import re

# Enough for the head of a page.
HEAD_BYTES = 4096
_PAGE = re.compile(rb"<(?:!doctype\s+html|html|head|body|script|meta|title)\b", re.IGNORECASE)
_XML = re.compile(rb"<(?:\?xml|error)\b", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>(.{1,200}?)</title>", re.IGNORECASE | re.DOTALL)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)


def answer_instead(head: bytes) -> str | None:
    """What a server sends in place of a file, in words, or None: a page to log in, an error, a pointer to the file."""
    text = _COMMENT.sub(b"", head).lstrip(b"\xef\xbb\xbf \t\r\n")
    if _PAGE.match(text) or (_XML.match(text) and _PAGE.search(text)):
        title = _TITLE.search(text)
        said = " ".join(html.unescape(title[1].decode("utf-8", "replace")).split()) if title else ""
        said = "".join(character for character in said if character.isprintable())[:80]
        return f"a web page{f' ({said!r})' if said else ''}; is it a share link? Give the address of the file itself"
    if _XML.match(text):
        return "an answer in XML, an error message perhaps; check the address"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer that stands for the file; give the address of the file itself, or run git lfs pull"
    return None
