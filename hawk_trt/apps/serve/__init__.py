"""Serving: many clients' requests on one pipeline.

job.py       what a client asks, and the events that it hears back
batcher.py   the queue, and the thread that runs what is in it
batch.py     rows that share decode steps
app.py       the HTTP application: create_app
exchange.py  one request of /v1/chat/completions, from its first byte to the last of its answer
service.py   what all requests share, and whether the server is ready
server.py    the process: uvicorn, signals
"""
