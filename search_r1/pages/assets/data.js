// The data of the page: blocks of gzip in base64, unpacked when they are needed.

const KEPT_CHUNKS = 12;
const unpackedChunks = new Map();

/** The text of the block `id`. */
export async function blockText(id) {
  const block = document.getElementById(id);
  if (!block) throw new Error(`the page has no block ${id}: it is not complete`);
  const packed = atob(block.textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/** The lines of a chunk. The last few chunks stay unpacked. */
export function chunkLines(number) {
  let lines = unpackedChunks.get(number);
  if (lines) unpackedChunks.delete(number);
  else lines = blockText(`chunk-${number}`).then((text) => text.split("\n"));
  unpackedChunks.set(number, lines);
  if (unpackedChunks.size > KEPT_CHUNKS) {
    unpackedChunks.delete(unpackedChunks.keys().next().value);
  }
  return lines;
}

/**
 * The whole record of an entry of the index.
 * @param {{chunk: number, at: number}} entry
 */
export async function loadRecord(entry) {
  const lines = await chunkLines(entry.chunk);
  return JSON.parse(lines[entry.at]);
}

/** The entries whose record holds `text`, whatever part of it; `isStale` stops the search. */
export async function entriesWith(index, text, isStale) {
  const wanted = JSON.stringify(text.toLowerCase()).slice(1, -1);
  const found = new Set();
  const chunks = new Set(index.map((entry) => entry.chunk));
  for (const chunk of chunks) {
    if (isStale()) return found;
    const lines = (await chunkLines(chunk)).map((line) => line.toLowerCase());
    for (const entry of index) {
      if (entry.chunk === chunk && lines[entry.at].includes(wanted)) found.add(entry);
    }
  }
  return found;
}
