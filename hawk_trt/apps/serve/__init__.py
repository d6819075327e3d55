"""Serving: many clients' requests on one pipeline, over OpenAI's protocol.

protocol.py    what a client sends and gets, as pydantic models
app.py         the HTTP application: create_app
middleware.py  what every request passes
chat.py        /v1/chat/completions, from the first byte of a request to the last of its answer
prompt.py      a chat becomes a job for the batcher
service.py     what all requests share, and whether the server is ready
server.py      the process: uvicorn, signals
job.py         what the batcher is asked, and the events that come back
batcher.py     the queue, and the thread that runs what is in it
batch.py       rows that share decode steps
"""
