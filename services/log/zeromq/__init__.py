"""The log without a broker: ingest sends each event to the process that owns its partition, and waits for its commit.

How an event gets its 202: ingest has one DEALER socket for each partition (:mod:`~services.log.zeromq.links`), and the
process that has a partition's file open binds a ROUTER socket for it (:mod:`~services.log.zeromq.log`). The event
goes there, into the owner's next round, and is answered after the round's commit: events, sequence and message id are
then fsynced in the partition's file. One message answers all events of a round that came from the same process.

So there is nothing between ingest and HDF5 that could lose an accepted event. What was sent and not answered may or may
not be stored; it is sent again under the same id, by ingest within its deadline and by the client after it, and the
corpus, which knows all ids, drops the copy.

The sequence of an event is its position in the partition's file. The file's lock decides who owns a partition: the
socket is bound after the file was opened, and closed before it is released.
"""
