"""Logs that cannot be written, here to a device that is always full."""

import logging
import os

import pytest

from reldn_d2.utils.events import FailSafeWriter, report_log_errors_once

from detectron2.utils.events import EventStorage, JSONWriter

FULL = "/dev/full"
pytestmark = pytest.mark.skipif(not os.path.exists(FULL), reason=f"needs {FULL}")


def test_fail_safe_writer_full_disk_logs_one_line(caplog):
    writer = FailSafeWriter(JSONWriter(FULL), "output")
    with EventStorage() as storage:
        for _ in range(3):
            storage.put_scalar("loss", 1.0)
            writer.write()
            storage.step()
    writer.close()
    (message,) = caplog.messages
    assert message.startswith("output/metrics.json cannot be written (No space left on device)")


def test_report_log_errors_once_full_disk_prints_one_line(capsys):
    logger = logging.getLogger("fvcore")
    handler = logging.StreamHandler(open(FULL, "w"))
    logger.addHandler(handler)
    try:
        report_log_errors_once()
        for _ in range(3):
            logger.error("a line")
        assert capsys.readouterr().err == f"{FULL} cannot be written (No space left on device).\n"
        handler.stream = None
        logger.error("a line")  # any other error is reported in full
        assert "Logging error" in capsys.readouterr().err
    finally:
        logger.removeHandler(handler)
