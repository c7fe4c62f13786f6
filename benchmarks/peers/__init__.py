# SPDX-License-Identifier: MIT
"""The peers: what a user would pick instead of postage, doing the same work.

`environments` makes a virtual environment for each of them, `cases` runs their programs. A program
is a module that bears the name of its peer. It runs in that environment, imports the peer, the
standard library and the modules of the benchmarks that need nothing else, and speaks `protocol`.
"""
