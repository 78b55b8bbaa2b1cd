"""The record of a run: written by ``JsonlRecorder``, read by ``read``, followed while it grows by ``follow``."""

from redline.integrations.record.follow import follow
from redline.integrations.record.reader import Record, read
from redline.integrations.record.recorder import JsonlRecorder

__all__ = ["JsonlRecorder", "Record", "follow", "read"]
