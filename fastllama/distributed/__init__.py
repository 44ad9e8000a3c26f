"""A model that several processes share.

`environment.py` reads the variables of a launcher such as torchrun. `rendezvous.py` connects the processes.
`model_parallel.py` has their group and its collectives. A command line program runs in one process, the driver
(`driver.py`); the others are workers (`worker.py`), which repeat its calls. `worker_processes.py` starts and watches
workers.
"""
