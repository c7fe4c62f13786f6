# SPDX-License-Identifier: MIT
"""Where the embedded broker is meant to differ; docs/topics/broker-support says the same."""

from __future__ import annotations

#: Scenarios and reasons.
DIFFERENCES = {
    "frames_out_of_place[unknown_class]": "540, where RabbitMQ cuts the connection",
    "frames_out_of_place[unknown_method]": "540, where RabbitMQ cuts the connection",
    "frames_out_of_place[unknown_field]": "502 with the reason, where RabbitMQ cuts the connection",
    "frames_out_of_place[properties_cut]": "502 with the reason, where RabbitMQ says 541 without",
    "an_expired_message_behind_the_head_is_counted[quorum]": (
        "what has expired behind the head is not counted once it is the head"
    ),
    "who_gets_singly_is_no_consumer[quorum]": "who gets singly is not counted as a consumer",
    "a_large_message_drops_several[quorum]": (
        "what is dropped at once dies in the order of the queue"
    ),
    "a_cancelled_consumer_may_settle_what_it_has[quorum]": (
        "a cancelled consumer is not counted any more, also while deliveries of it are unsettled"
    ),
}
