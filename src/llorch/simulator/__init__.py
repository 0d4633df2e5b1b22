"""`llorch simulate`: the real scheduler under a virtual clock, next to simple queues, on the same modelled replicas.

An operator's what-if tool and a proof of scale. It opens no socket, and takes the clock only from the events it plans.
"""
