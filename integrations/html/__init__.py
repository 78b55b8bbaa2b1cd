"""Pages to look at: one self-contained HTML file each, which opens offline."""

from redline.integrations.html.compare import compare_page
from redline.integrations.html.report import report_page

__all__ = ["compare_page", "report_page"]
