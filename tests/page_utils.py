"""Shared by tests of HTML pages."""

import json
import re


def page_data(page: str) -> dict:
    """What the scripts of a page get to show."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
