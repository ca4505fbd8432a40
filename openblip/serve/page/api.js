// Speaks to the server: the token, waiting when it is busy, its errors as sentences, streamed events.

/** What the server answered instead of a result: its sentence, with the request's id. */
export class ServerError extends Error {
  constructor(status, message, requestId) {
    super(requestId ? `${message} (request ${requestId})` : message);
    this.status = status;
  }
}

/** The server could not be reached at all. */
export class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

const MAX_WAITS = 6;
const TOKEN_KEY = "openblip-token";

let token = readToken();
let tokenAsked = null;
let askForToken = async () => null;
let onUnreachable = () => {};

function readToken() {
  try {
    return sessionStorage.getItem(TOKEN_KEY);
  } catch {
    return null;
  }
}

export const hasToken = () => token !== null;

/** Say who asks the user for a token (a promise of it) and who is told that nothing answers. */
export function listen(hooks) {
  askForToken = hooks.askForToken;
  onUnreachable = hooks.onUnreachable;
}

/** Return an address of the server, also where the page is served under a path of a proxy. */
export const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI).href;

async function newToken(refused) {
  if (token !== refused) return;
  tokenAsked ??= askForToken(refused !== null).finally(() => {
    tokenAsked = null;
  });
  const given = await tokenAsked;
  if (given === null) return;
  token = given;
  try {
    sessionStorage.setItem(TOKEN_KEY, token);
  } catch {
    // Without storage the token lasts until the page is left.
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}

async function wait(response, signal, onWait) {
  const asked = Number(response.headers.get("Retry-After"));
  for (let left = Math.max(1, Math.ceil(asked) || 1); left > 0; left -= 1) {
    onWait?.(left);
    await pause(1000, signal);
  }
  onWait?.(0);
}

async function errorOf(response) {
  const fallback = `The server answered ${response.status}.`;
  const named = response.headers.get("X-Request-Id");
  try {
    const { error } = await response.json();
    return new ServerError(response.status, error.message ?? fallback, error.request_id ?? named);
  } catch {
    return new ServerError(response.status, fallback, named);
  }
}

/**
 * Send a request and return the answer once it is a good one.
 *
 * A busy server (429, or 503 with Retry-After) is asked again after the time that it names;
 * `onWait` is called with the seconds left. A 401 asks the user for a token first.
 * Throws ServerError, Unreachable, or the signal's reason.
 */
export async function request(path, { form, signal, onWait } = {}) {
  for (let waits = 0; ;) {
    const sent = token;
    let response;
    try {
      response = await fetch(address(path), {
        method: form ? "POST" : "GET",
        body: form,
        signal,
        headers: sent === null ? {} : { Authorization: `Bearer ${sent}` },
      });
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      onUnreachable();
      throw new Unreachable();
    }
    if (response.ok) return response;
    const isBusy =
      response.status === 429 || (response.status === 503 && response.headers.has("Retry-After"));
    if (isBusy && waits < MAX_WAITS) {
      waits += 1;
      await wait(response, signal, onWait);
    } else if (response.status === 401) {
      const refusal = await errorOf(response);
      await newToken(sent);
      if (token === sent) throw refusal;
    } else {
      throw await errorOf(response);
    }
  }
}

/** Send a request and return its JSON. */
export async function call(path, options) {
  return (await request(path, options)).json();
}

/** Send a request and return its body, as a Blob. */
export async function fetchBlob(path, options) {
  return (await request(path, options)).blob();
}

/** Send a request whose answer is a stream of events; `onEvent(name, data)` gets each, in order. */
export async function stream(path, { onEvent, ...options }) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r", "");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) deliver(block, response, onEvent);
    }
  } catch (error) {
    if (options.signal?.aborted) throw options.signal.reason;
    if (error instanceof ServerError) throw error;
    onUnreachable();
    throw new Unreachable();
  }
}

function deliver(block, response, onEvent) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (!data.length) return;
  const content = JSON.parse(data.join("\n"));
  if (name === "error") {
    const error = content.error ?? content;
    throw new ServerError(
      response.status, error.message, error.request_id ?? response.headers.get("X-Request-Id"));
  }
  onEvent(name, content);
}

/** Return an address that an <img> can show: with a token the picture is fetched with it first. */
export async function pictureAddress(path) {
  if (!hasToken()) return address(path);
  return URL.createObjectURL(await fetchBlob(path));
}
