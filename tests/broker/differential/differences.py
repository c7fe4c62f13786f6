# SPDX-License-Identifier: MIT
"""Where the embedded broker is meant to differ; docs/topics/broker-support says the same."""

from __future__ import annotations

#: Scenarios and reasons.
DIFFERENCES = {
    "frames_out_of_place[unknown_class]": "540, where RabbitMQ cuts the connection",
    "frames_out_of_place[unknown_method]": "540, where RabbitMQ cuts the connection",
    "frames_out_of_place[unknown_field]": "502 with the reason, where RabbitMQ cuts the connection",
    "frames_out_of_place[properties_cut]": "502 with the reason, where RabbitMQ says 541 without",
    "a_cancelled_consumer_may_settle_what_it_has[quorum]": (
        "a cancelled consumer is not counted any more, also while deliveries of it are unsettled"
    ),
}
