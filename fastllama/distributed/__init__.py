"""A model that several processes share.

`environment.py` reads what a launcher such as torchrun set, `rendezvous.py` connects the processes, `parallel.py` has
their group and its collectives. A command line program runs in one process, the driver (`driver.py`); the others are
workers (`worker.py`), which repeat its calls. `worker_processes.py` starts and watches workers.
"""
