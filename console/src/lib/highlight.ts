// Colours for protocol sources. Words are told apart by shape, not by a grammar: the server's compiler is the judge.

export type TokenKind = 'comment' | 'string' | 'number' | 'keyword' | 'type' | 'param' | 'name' | 'plain';
export interface Token {
  kind: TokenKind;
  text: string;
}

const KEYWORDS = new Set(
  `protocol transport setting error close answer lenient define on rule command table param var message check else fail if switch repeat while
  until to within attempt end break done skip peek left rest login password refused reply send expect session and or not in true false
  null bool signed except tcp udp tls`.split(/\s+/),
);
const TYPES = /^(?:[usf](?:8|16|24|32|40|48|64)(?:le|be)?|int|decimal|float|text|bytes|hex|bcd|digits|json)$/;
// In turn: comment, text or hex digits in quotes, number or date, parameter of the message (#name), word (dots within).
const PATTERN = /(\/\/[^\n]*)|(x?"(?:[^"\\\n]|\\.)*"?)|(@[\d:TZ-]+|\b0[xX][0-9a-fA-F_]+|\b0b[01_]+|\b\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?)|(#[\w.]+)|([A-Za-z_][\w]*(?:\.\w+)*)/g;

/** The text of one line as coloured pieces; together they are the line again. */
export function tokens(line: string): Token[] {
  const out: Token[] = [];
  let at = 0;
  const plain = (end: number) => {
    if (end > at) out.push({ kind: 'plain', text: line.slice(at, end) });
  };
  for (const found of line.matchAll(PATTERN)) {
    plain(found.index);
    const [text, comment, string, number, param] = found;
    const kind: TokenKind = comment
      ? 'comment'
      : string
        ? 'string'
        : number
          ? 'number'
          : param
            ? 'param'
            : TYPES.test(text)
              ? 'type'
              : KEYWORDS.has(text) || text.startsWith('session.') || text.startsWith('setting.')
                ? 'keyword'
                : 'name';
    out.push({ kind, text });
    at = found.index + text.length;
  }
  plain(line.length);
  return out;
}

/** The source under another name: the word after `protocol` is changed, or a first line put before it. */
export function renamed(source: string, name: string): string {
  const head = /^([ \t]*protocol[ \t]+)[A-Za-z_]\w*/m;
  return head.test(source) ? source.replace(head, `$1${name}`) : `protocol ${name} ""\n\n${source}`;
}

/** Where to begin a protocol of one's own. */
export function skeleton(name: string): string {
  return `protocol ${name} "What it is, in one line"

transport tcp

error bad_position close

// A line for each position: ident;latitude;longitude, such as unit7;52.5163;13.3777
on tcp {
    ident: until ";"
    login ident
    message {
        #position.latitude: number(until ";") else bad_position
        #position.longitude: number(until "\\n") else bad_position
    }
}
`;
}
