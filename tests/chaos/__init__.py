# SPDX-License-Identifier: MIT
"""Messages under faults: what was reported as confirmed is handled, whatever breaks."""
