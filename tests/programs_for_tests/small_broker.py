# SPDX-License-Identifier: MIT
"""An embedded broker with small limits, as a process of its own whose memory can be measured.

Its argument is an object of JSON: settings of the broker, and besides ``handshake_seconds`` and
``open_files``. It prints its port, and ends with SIGTERM.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

from postage.broker import Broker, connection


def main(settings: str) -> None:
    """Run a broker until a signal comes."""
    options = json.loads(settings)
    logging.basicConfig(level=logging.WARNING)
    connection.HANDSHAKE_SECONDS = options.pop("handshake_seconds", connection.HANDSHAKE_SECONDS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (options.pop("open_files", most), most))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Broker(**options) as broker:
            print(broker.port, flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        print("stopped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
