//! What a text consists of: words, links, what is searched for. And what of it can be trusted.
//!
//! Pure. Invariant: the pieces put together are the text; a link goes where it says it goes, over http or https.

export interface Piece {
  readonly text: string;
  readonly href?: string;
  /** It is what is searched for. */
  readonly found?: boolean;
}

/** No spaces, quotes, brackets, and nothing that is invisible or turns the direction of writing. */
const LINK = /https?:\/\/[^\s<>"'`{}|\\^\u0000-\u0020\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]+/giu;

/** The text with its links. */
export function linksOf(text: string): Piece[] {
  const pieces: Piece[] = [];
  let end = 0;
  for (const match of text.matchAll(LINK)) {
    const link = withoutTail(match[0]);
    const href = addressOf(link);
    if (href === undefined) continue;
    if (match.index > end) pieces.push({ text: text.slice(end, match.index) });
    pieces.push({ text: link, href });
    end = match.index + link.length;
  }
  if (end < text.length) pieces.push({ text: text.slice(end) });
  return pieces;
}

/** The pieces with what is searched for set apart; `needle` is in small letters. */
export function marked(pieces: readonly Piece[], needle: string): Piece[] {
  if (needle === '') return [...pieces];
  return pieces.flatMap((piece) => {
    const small = lower(piece.text);
    const out: Piece[] = [];
    let end = 0;
    for (let at = small.indexOf(needle); at >= 0; at = small.indexOf(needle, end)) {
      if (at > end) out.push({ ...piece, text: piece.text.slice(end, at) });
      end = at + needle.length;
      out.push({ ...piece, text: piece.text.slice(at, end), found: true });
    }
    if (end < piece.text.length) out.push({ ...piece, text: piece.text.slice(end) });
    return out;
  });
}

/** In small letters, and as long as it was: characters that would become longer stay. */
export function lower(text: string): string {
  const small = text.toLowerCase();
  return small.length === text.length ? small : Array.from(text, (one) => (one.toLowerCase().length === one.length ? one.toLowerCase() : one)).join('');
}

/** Nothing but a few emoji: they are shown large. */
export function isEmojiOnly(text: string): boolean {
  if (text.length > 40) return false;
  const rest = text.trim();
  if (rest === '' || !/^(?:\p{Emoji_Presentation}|\p{Emoji}\ufe0f|\p{Emoji_Modifier}|\p{Regional_Indicator}|\u200d)+$/u.test(rest)) return false;
  return Array.from(new Intl.Segmenter().segment(rest)).length <= 3;
}

/** One line of it, for the list and for notifications. */
export function oneLine(text: string): string {
  return text.slice(0, 200).replace(/\s+/gu, ' ').trim();
}

/** There is something to be seen in it: not only what is invisible. */
export function isVisible(text: string): boolean {
  return /[^\s\p{Cc}\p{Cf}\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufe00-\ufe0f]/u.test(text);
}

/** Bytes of UTF-8. */
export function bytesOf(text: string): number {
  let bytes = 0;
  for (const character of text) {
    const code = character.codePointAt(0) as number;
    bytes += code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  }
  return bytes;
}

/** What can be a user's name. */
export const isName = (name: string): boolean => /^[a-z0-9][a-z0-9_-]{0,63}$/.test(name);

/** As people write it: with capital letters, with an @ and spaces around. */
export const nameOf = (typed: string): string => typed.trim().replace(/^@/, '').toLowerCase();

/** Punctuation at the end belongs to the sentence, and a bracket if it was not opened in the link. */
function withoutTail(link: string): string {
  const count = (sign: string) => link.split(sign).length - 1;
  const unopened = { ')': count(')') - count('('), ']': count(']') - count('[') };
  let end = link.length;
  for (; end > 0; end -= 1) {
    const last = link[end - 1] as string;
    if (last === ')' || last === ']') {
      if (unopened[last] <= 0) break;
      unopened[last] -= 1;
    } else if (!/[.,;:!?…]/u.test(last)) break;
  }
  return link.slice(0, end);
}

/**
 * A host as it is read: `https://bank.example@evil.example` and `https://bank.example⁄evil.example` (no slash, but what looks like one) look like what they are
 * not, and so do encoded hosts, and colons that are letters.
 */
const HOST = /^https?:\/\/(?:(?:(?![\u02b0-\u02ff])[\p{L}\p{M}\p{N}._-])+|\[[0-9a-f:.]+\])(?::[0-9]*)?(?:[/?#]|$)/iu;

function addressOf(link: string): string | undefined {
  if (!HOST.test(link)) return undefined;
  try {
    const { protocol, href, hostname, username, password } = new URL(link);
    if (username !== '' || password !== '' || hostname === '') return undefined;
    return protocol === 'http:' || protocol === 'https:' ? href : undefined;
  } catch {
    return undefined;
  }
}
