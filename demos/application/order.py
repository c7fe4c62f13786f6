# SPDX-License-Identifier: MIT
"""Orders a dish from one of the waiters: ``python order.py onion soup``."""

import sys

from kitchen import KitchenProducer

dish = " ".join(sys.argv[1:]) or "bread"
with KitchenProducer({"name": "guest"}) as producer:
    answer = producer.rpc_serve(dish, _key="waiter/rr", _timeout=5, _max_retry=0)
print(answer.value if answer else answer.message)
