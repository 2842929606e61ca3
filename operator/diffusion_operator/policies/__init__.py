"""What is to be done about a job: one file per word of the spec or status, each a pure function of a `Case`.

Belongs here: policies (`Case -> Decision`, or None where another one shall answer) and the pure judgements that they
share. Must not be here: their order (`decide`), reading or writing the cluster, clocks.
"""
