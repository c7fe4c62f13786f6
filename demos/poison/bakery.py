# SPDX-License-Identifier: MIT
"""A bakery that takes orders, such as "3 rolls": ``postage run bakery:Bakery``."""

from postage import messaging
from postage.generic_application import GenericApplication
from postage.retry import RetryPolicy

NUMBERS = {}


class Bakery(GenericApplication):
    retry = RetryPolicy(attempts=3, delay=0.3, jitter=0)

    @messaging.MessageHandler("command", "bake")
    def msg_bake(self, content):
        number, what = content["parameters"].rsplit(maxsplit=1)
        count = NUMBERS.get(number) or int(number)
        print(f"baked {count} {what}", flush=True)
