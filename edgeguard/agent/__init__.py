"""The device daemon: takes inputs, runs the guarded model, keeps reports until the hub stored them, updates.

One process. A loop infers and waits for nothing else (``daemon``); a second thread has all that may wait: disk,
network, updates (``reporter``). Fetching a signed model and fitting the guard anew are short-lived child processes.
Nothing here imports a training framework, a converter, the hub or TUF.
"""
