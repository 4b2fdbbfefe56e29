// Server-sent events as the answer to a POST, which an EventSource cannot send.

/**
 * Posts `body` and yields the events of the answer, in their order.
 * @param {string} address
 * @param {Object} body
 * @param {AbortSignal} signal  ends it
 * @returns {AsyncGenerator<{name: string, data: any}>}
 */
export async function* postForEvents(address, body, signal) {
  const answer = await fetch(address, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw new Error(await reasonOf(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) yield eventOf(block);
  }
}

function eventOf(block) {
  const fields = new Map(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
  return { name: fields.get("event"), data: JSON.parse(fields.get("data")) };
}

/** Why an answer is none: its `detail`, which the server sends as JSON. */
async function reasonOf(answer) {
  const text = await answer.text();
  try {
    const { detail } = JSON.parse(text);
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return `status ${answer.status}`;
  }
}
