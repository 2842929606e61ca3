"""What the tests stand on: binaries, servers and clusters that are real, builders and fakes that are ours.

Belongs here: whatever starts, builds or waits for something on behalf of a test. Waiting lives here, with deadlines, so
that no test sleeps. Does not belong here: assertions about the product, and anything that the product imports.
"""
