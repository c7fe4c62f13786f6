# SPDX-License-Identifier: MIT
"""What each program here imports first: the way to the broker of the tests, and to their output.

Postage 1.2.1 finds its broker at localhost:5672 and nowhere else. Under Python 2.7 this module
therefore puts the address of POSTAGE_URL into pika, before `postage` is imported.
"""

from __future__ import print_function

import json
import os
import sys

IS_121 = sys.version_info[0] == 2
WHO = "1.2.1" if IS_121 else "ours"

#: The exchange and the prefix of the queues, so that two tests do not meet on one broker.
NAME = sys.argv[1]


def say(word, value=None):
    """Write a line that a test waits for: a word, and a value as JSON."""
    print(word, json.dumps(value, sort_keys=True, default=str))
    sys.stdout.flush()


def _lead_121_to(url):
    import urllib

    import pika
    import urlparse

    broker = urlparse.urlsplit(url)
    os.environ["POSTAGE_USER"] = urllib.unquote(broker.username or "guest")
    os.environ["POSTAGE_PASSWORD"] = urllib.unquote(broker.password or "guest")
    os.environ["POSTAGE_VHOST"] = urllib.unquote(broker.path[1:]) or "/"
    parameters_class = pika.ConnectionParameters

    def parameters_of_this_broker(_localhost, **kwds):
        return parameters_class(broker.hostname, broker.port or 5672, **kwds)

    pika.ConnectionParameters = parameters_of_this_broker


if IS_121:
    _lead_121_to(os.environ["POSTAGE_URL"])
