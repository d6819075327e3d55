// The server's API: what it serves, and one streamed answer.

/** What the server, or the way to it, had to say instead of an answer. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = "";

/** Use a key from now on; it is kept nowhere else. */
export function useKey(text) {
  key = text.trim();
}

/** The model that the server has, as /v1/models tells of it. */
export async function servedModel() {
  const response = await send("v1/models");
  return (await response.json()).data[0];
}

/**
 * Ask, and call onText with each new piece of the answer.
 * Returns { usage, details } of the whole answer; throws ServerError, or AbortError after signal.
 */
export async function ask(body, signal, onText) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true }, hawk: { details: true } }),
    signal,
  });
  const told = { usage: null, details: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return told;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, chunk.error.message);
    told.usage = chunk.usage ?? told.usage;
    told.details = chunk.hawk ?? told.details;
    const text = chunk.choices[0]?.delta.content;
    if (text) onText(text);
  }
  throw new ServerError(response.status, "The connection ended before the answer did. Ask again.");
}

async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. It may have stopped, or the network may be down.");
  }
  if (!response.ok) throw new ServerError(response.status, await messageOf(response));
  return response;
}

async function messageOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered with status ${response.status}.`; // something else between it and this page
  }
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The connection broke before the answer was complete. Ask again.");
  } finally {
    reader.cancel().catch(() => {}); // it may have broken, which was told above
  }
}
