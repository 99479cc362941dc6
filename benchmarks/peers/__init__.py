"""The servers that are compared, one module for each library.

Each shows what somebody who knows the library would write, with nothing tuned and nothing
hampered: they read 64 KiB at most, write 64 KiB at a time, and have TCP_NODELAY or not as
the library has it. All do the same four works on a connection:

- ``echo``: send back what comes, until the end.
- ``receive``: a request, which is a decimal number, is echoed; then so many bytes are read and
  dropped, and how many they were is answered. Then comes the next request.
- ``send``: a request is answered by so many bytes (a multiple of 64 KiB).
- ``lines``: count lines until the end, and answer how many they were.
"""
