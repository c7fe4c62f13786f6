# SPDX-License-Identifier: MIT
"""The applications of a restaurant.

``python kitchen.py cook [GROUP ...]`` starts a cook, ``python kitchen.py waiter`` a waiter.
Start as many as you like, on as many hosts as you like. Ctrl-C sends one home.
"""

import sys

from postage import messaging, microthreads
from postage.generic_application import GenericApplication, GenericApplicationExchange

SEASONING = "salt"

#: Seconds that a dish is on the stove.
COOKING_TIME = 0.3


class KitchenProducer(messaging.GenericProducer):
    """Sends to cooks and waiters; by default an order goes to one of the cooks, in turn."""

    eks = [(GenericApplicationExchange, "cook/rr")]


class Cook(GenericApplication):
    seasoning = SEASONING

    @messaging.MessageHandler("command", "season")
    def msg_season(self, content):
        self.seasoning = content["parameters"]
        print("seasoning with", self.seasoning)

    @messaging.RpcHandler("command", "cook")
    def rpc_cook(self, content, reply_func):
        dish = content["parameters"]
        print("cooking", dish)
        yield microthreads.sleep(COOKING_TIME)  # meanwhile other orders are taken
        reply_func(f"{dish} with {self.seasoning}")


class Waiter(GenericApplication):
    def __init__(self, fingerprint, groups=()):
        super().__init__(fingerprint, groups=groups)
        self.kitchen = KitchenProducer(fingerprint)

    @messaging.RpcHandler("command", "serve")
    def rpc_serve(self, content, reply_func):
        dish = content["parameters"]
        print("taking an order:", dish)
        meal = yield self.kitchen.rpc_cook(dish, _future=True)  # other guests are served meanwhile
        if meal:
            reply_func(f"Here you are: {meal.value}")
        else:
            reply_func(messaging.MessageResultError(f"Sorry, no {dish} today: {meal.message}"))

    def before_close(self, restarting):
        self.kitchen.close()
        super().before_close(restarting)


APPLICATIONS = {"cook": Cook, "waiter": Waiter}


def main(name, *groups):
    fingerprint = messaging.Fingerprint(name, "application").as_dict()
    scheduler = microthreads.MicroScheduler()
    scheduler.add_microthread(APPLICATIONS[name](fingerprint, groups=groups))
    print("{name} {pid}@{host} is at work".format(**fingerprint))
    with scheduler.stop_on_signals():
        for _ in scheduler.main():
            pass


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in APPLICATIONS:
        sys.exit(__doc__)
    main(*sys.argv[1:])
