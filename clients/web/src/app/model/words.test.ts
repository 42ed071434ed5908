import { describe, expect, it } from 'vitest';

import { withDice } from './dice';
import { bytesOf, isEmojiOnly, isName, isVisible, linksOf, lower, marked, nameOf, oneLine } from './words';

const linkOf = (text: string) => linksOf(text).find(({ href }) => href !== undefined);

describe('links', () => {
  it('go over http and https only, and where they say', () => {
    expect(linkOf('see https://example.com/a?b=c#d')).toEqual({ text: 'https://example.com/a?b=c#d', href: 'https://example.com/a?b=c#d' });
    for (const text of ['javascript:alert(1)', 'data:text/html,x', 'ftp://example.com', 'https://', 'http://[', 'https://a@example.com', 'https://bank.example@evil.example/', 'HTTPS//x']) {
      expect(linkOf(text), text).toBeUndefined();
    }
  });

  it('end where the sentence goes on', () => {
    for (const [text, link] of [
      ['(https://example.com/a)', 'https://example.com/a'],
      ['https://example.com/a_(b)', 'https://example.com/a_(b)'],
      ['(https://example.com/a_(b)).', 'https://example.com/a_(b)'],
      ['https://example.com, and', 'https://example.com'],
      ['https://example.com/?!', 'https://example.com/'],
      ['https://example.com/a\u202egnp.exe', 'https://example.com/a'],
      ['https://example.com/a\u200bb', 'https://example.com/a'],
    ]) {
      expect(linkOf(text!)?.text, text).toBe(link);
    }
  });

  it('have no host that is read as another', () => {
    for (const text of ['https://bank.example\u2044x.evil.example/', 'https://bank.example\u2215x.evil.example/', 'https://bank.example\u29f8x.evil.example/', 'https:///evil.example', 'https://%65vil.example/', 'https://bank.example\u02d01x.evil.example/', 'https://bank.example:1:2/']) {
      expect(linkOf(text), text).toBeUndefined();
    }
    for (const text of ['http://127.0.0.1:8080', 'https://[::1]:8080/a', 'https://münchen.example/ä', 'https://日本語.example/', 'http://my_host?a']) expect(linkOf(text)?.text, text).toBe(text);
  });

  it('take no time, however they end', () => {
    const begun = performance.now();
    expect(linkOf(`https://example.com/${')'.repeat(200_000)}`)?.text).toBe('https://example.com/');
    expect(linkOf(`https://example.com/${'('.repeat(100_000)}${')'.repeat(100_000)}`)?.text).toHaveLength(200_020);
    expect(performance.now() - begun).toBeLessThan(2_000);
  });

  it('show where a name in another script really goes', () => {
    expect(linkOf('https://аррӏе.com')?.href).toBe('https://xn--80ak6aa92e.com/');
  });
});

describe('pieces', () => {
  const parts = ['https://example.com/(a)', ' ', 'HELLO', 'hello', '\n', '<b>', 'İ', 'ẞ', '👩‍👩‍👧', '\u202e', '\ud800', ').', 'http://', ':'];

  it('are the text when they are put together', () => {
    withDice(300, (dice) => {
      const text = Array.from({ length: dice.roll(30) }, () => dice.pick(parts)).join('');
      const needle = lower(dice.pick(['hello', 'e', 'i', '://', '']));
      const pieces = marked(linksOf(text), needle);
      expect(pieces.map((piece) => piece.text).join('')).toBe(text);
      for (const { text, found, href } of pieces) {
        if (found) expect(lower(text)).toBe(needle);
        if (href) expect(href).toMatch(/^https?:\/\//);
      }
    });
  });
});

describe('words', () => {
  it('know what can be seen', () => {
    for (const text of ['a', '.', '👍', 'שלום', '\u200b!']) expect(isVisible(text), text).toBe(true);
    for (const text of ['', ' ', '\n', '\u200b\u200d', '\ufeff', '\u202e', '\u3164', '\u0000']) expect(isVisible(text), JSON.stringify(text)).toBe(false);
  });

  it('know emoji', () => {
    for (const text of ['👍', '❤️', '👩‍👩‍👧', '🇩🇪', '👍🏽', '🎉🎉🎉', ' ☕ ']) expect(isEmojiOnly(text), text).toBe(true);
    for (const text of ['', '1', '#', 'ok 👍', '🎉🎉🎉🎉', '©']) expect(isEmojiOnly(text), text).toBe(false);
  });

  it('count bytes as the server does', () => {
    for (const text of ['', 'a', 'ü', '€', '👍', 'a\ud800']) expect(bytesOf(text), text).toBe(new TextEncoder().encode(text).length);
  });

  it('know names, and how people write them', () => {
    for (const name of ['a', 'alice', 'a-1_b', '0']) expect(isName(name), name).toBe(true);
    for (const name of ['', 'Alice', '-a', '_a', 'a b', 'ä', 'a'.repeat(65), 'a/b']) expect(isName(name), name).toBe(false);
    expect(nameOf(' @Alice ')).toBe('alice');
  });

  it('fit into a line', () => {
    expect(oneLine('  a\n\n b\t c ')).toBe('a b c');
    expect(oneLine('x'.repeat(10_000))).toHaveLength(200);
  });
});
