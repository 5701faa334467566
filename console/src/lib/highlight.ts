// Colours for protocol sources. Words are told apart by shape, not by a grammar: the server's compiler is the judge.

export type TokenKind = 'comment' | 'string' | 'number' | 'keyword' | 'type' | 'name' | 'plain';
export interface Token {
  kind: TokenKind;
  text: string;
}

const KEYWORDS = new Set(
  `protocol description transport transports settings setting command commands rule frame frames message messages emit field fields let var
  if else elif when otherwise match case switch default for in each repeat while until loop count times end of take skip peek read
  seek rest at from to by as is not and or true false null none return fail error expect check verify assert reply answer send
  close login ident identify accept refuse refused const table map enum struct record type use include import with after before on
  delimited delimiter until length bytes little big le be tcp udp tls state title params param lenient container`.split(/\s+/),
);
const TYPES = /^(?:[usif](?:8|16|24|32|64)(?:le|be)?|f(?:32|64)(?:le|be)?|bool|int|decimal|float|text|string|ascii|hex|json|bits?|bcd|byte|timestamp|crc16|crc32|xor|sum)$/;
const PATTERN = /(#[^\n]*|\/\/[^\n]*)|("(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?)|(\b0[xX][0-9a-fA-F_]+|\b0b[01_]+|\b\d[\d_]*(?:\.\d+)?)|([A-Za-z_][A-Za-z0-9_]*)/g;

/** The text of one line as coloured pieces; together they are the line again. */
export function tokens(line: string): Token[] {
  const out: Token[] = [];
  let at = 0;
  const plain = (end: number) => {
    if (end > at) out.push({ kind: 'plain', text: line.slice(at, end) });
  };
  for (const found of line.matchAll(PATTERN)) {
    plain(found.index);
    const [text, comment, string, number] = found;
    const kind: TokenKind = comment ? 'comment' : string ? 'string' : number ? 'number' : TYPES.test(text) ? 'type' : KEYWORDS.has(text) ? 'keyword' : 'name';
    out.push({ kind, text });
    at = found.index + text.length;
  }
  plain(line.length);
  return out;
}
