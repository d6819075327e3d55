"""Serving: many clients' requests on one pipeline, over OpenAI's protocol.

protocol.py    what a client sends, as pydantic models; answers.py what it gets
app.py         the HTTP application: create_app
middleware.py  what every request passes
chat.py        /v1/chat/completions, from the first byte of a request to the last of its answer
prompt.py      a chat becomes a request for the batcher, where it is large in a process of worker.py
service.py     what all requests share, and whether the server is ready
server.py      the process: uvicorn, signals
batcher.py     the scheduler in a thread, and the events that come back
"""
