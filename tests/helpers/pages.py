"""A page read as a browser's rules tell its elements apart, without running it."""

import html.parser
import json


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of every script, as a browser's rules tell them apart."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self._inside, self.words = [], [], None, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.words.append(data)

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def charts(self):
        return json.loads(self.scripts[0])["charts"]
