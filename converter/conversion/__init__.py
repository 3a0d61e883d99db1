"""One conversion, from its plan to its index.

plan: everything that is known before the first weight is read; made once, shown, and carried out
(`plan.py`).
unit: one piece of work: quantize an expert, quantize a matrix of the trunk, or copy a tensor
(`units.py`). Its key says which (`keys.py`); its result is bytes and a record.
record: what the journal keeps of a unit, a complete layer file or a shard; one class a kind
(`records.py`).
journal: the fingerprint (`identity.py`) and the records, one checked line each (`journal.py`).
Finished work: the records by key (`finished_work.py`).
worker: does a unit (`worker.py`).
files: the trunk and the layer files under construction, `.partial` until they are complete
(`output_files.py`).
run: the units that are left, over threads, in any order (`run.py`); then the remaining files, the
index last (`completion.py`).

Invariants: the same bytes for any number of workers, any order, and after any interruption. A
unit's bytes are durable before its record. A record counts only while its bytes have its checksum.
A worker writes nothing; files know no weights; a folder without an index is not complete.
"""
