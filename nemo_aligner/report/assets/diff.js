// What differs between two texts, by words: the longest common subsequence.

const words = text => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
const MOST = 2_000_000; // comparisons; above it texts are shown unmarked

// [[kind, text]] of both texts, kind being "same", "gone" (of `old` alone) or "new"; null where they are too long
function difference(old, fresh) {
  const a = words(old), b = words(fresh);
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const n = a.length - start - end, m = b.length - start - end;
  if (n * m > MOST) return null;
  // common[i][j]: words that a[start + i:] and b[start + j:] share in order
  const width = m + 1, common = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      common[i * width + j] = a[start + i] === b[start + j] ? common[(i + 1) * width + j + 1] + 1 : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  const parts = [];
  const push = (kind, text) => {
    if (parts.at(-1)?.[0] === kind) parts.at(-1)[1] += text;
    else if (text) parts.push([kind, text]);
  };
  push("same", a.slice(0, start).join(""));
  for (let i = 0, j = 0; i < n || j < m;) {
    if (i < n && j < m && a[start + i] === b[start + j]) push("same", a[start + i++]), j++;
    else if (i < n && (j === m || common[(i + 1) * width + j] >= common[i * width + j + 1])) push("gone", a[start + i++]);
    else push("new", b[start + j++]);
  }
  push("same", a.slice(a.length - end).join(""));
  return parts;
}

// `text` as elements: `parts` of it marked, or what `pattern` matches
function marked(text, parts, side) {
  if (parts === null) return [text];
  const own = [];
  parts.forEach(([kind, piece], place) => {
    if (kind !== "same" && kind !== side) return;
    const isGap = kind === "same" && !piece.trim() && place > 0 && place < parts.length - 1; // between two changes
    const shown = isGap ? own.at(-1)?.[0] ?? "same" : kind;
    if (own.at(-1)?.[0] === shown) own.at(-1)[1] += piece; else own.push([shown, piece]);
  });
  return own.map(([kind, piece]) => kind === "same" ? piece : make(kind === "gone" ? "del" : "ins", {}, piece));
}

function highlighted(text, pattern) {
  if (!pattern) return [text];
  const found = [];
  let last = 0;
  for (const match of text.matchAll(pattern)) {
    if (!match[0]) continue;
    found.push(text.slice(last, match.index), make("mark", {}, match[0]));
    last = match.index + match[0].length;
  }
  return [...found, text.slice(last)];
}
