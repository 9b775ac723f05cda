"""The device daemon: takes inputs, runs the guarded model, keeps reports until the hub stored them, updates.

One process, one main thread. The network runs in a thread that only hands events over; fetching a signed
model is a short-lived child process. Nothing here imports a training framework, a converter, the hub or TUF.
"""
