# SPDX-License-Identifier: MIT
"""Benchmarks: postage beside plain pika, which does the same work in the same run.

``python -m benchmarks`` measures and prints a table; ``--help`` lists the options. A workload
is a module: `publishing`, `consuming`, `calling`. It lists `Case`s, each a function that does
the work once in a process of its own and returns what it measured. The other modules do not
know what is measured: `measuring` repeats the cases in turn and compares them, `reporting`
shows the result, `broker` and `children` provide what cases need.
"""
