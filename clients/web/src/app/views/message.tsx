//! One message: its words, when, how far it has come, and what can be done with it.

import type { JSX } from 'preact';
import { useState } from 'preact/hooks';

import { exactly, timeOf } from '../format';
import type { MessageRow, Tick } from '../model/rows';
import { isEmojiOnly, isVisible, linksOf, lower, marked, type Piece } from '../model/words';
import { texts } from '../texts';
import { TickIcon, Icon } from './icons';
import { memo } from './memo';
import { Menu, type Item } from './menu';

/** Longer texts are cut off until the user asks for all. */
const SHOWN_MAX = 1_500;
const LINES_MAX = 24;

/** What can be done with a message. */
export interface Deeds {
  copy(text: string): void;
  quote(text: string): void;
  edit(seq: number): void;
  unsend(seq: number): void;
  remove(seq: number): void;
  retry(id: string): void;
  discard(id: string): void;
  /** It is about to become higher or lower. */
  hold(key: string): void;
}

export interface MessageProps {
  rowKey: string;
  mine: boolean;
  from: string;
  at: number;
  text: string | undefined;
  seq: number | undefined;
  outgoingId: string | undefined;
  failure: string | undefined;
  isEdited: boolean;
  first: boolean;
  last: boolean;
  tick: Tick | undefined;
  isChosen: boolean;
  needle: string;
  isFound: boolean;
  position: number;
  size: number;
  deeds: Deeds;
}

export function propsOf(row: MessageRow): Pick<MessageProps, 'rowKey' | 'mine' | 'from' | 'at' | 'text' | 'seq' | 'outgoingId' | 'failure' | 'isEdited' | 'first' | 'last'> {
  return {
    rowKey: row.key,
    mine: row.mine,
    from: row.from,
    at: row.at,
    text: row.text,
    seq: row.entry?.seq,
    outgoingId: row.outgoing?.id,
    failure: row.outgoing?.failure,
    isEdited: row.entry?.editedAt !== undefined && row.text !== undefined,
    first: row.first,
    last: row.last,
  };
}

export const Message = memo((props: MessageProps) => {
  const { rowKey, mine, from, at, text, failure, isEdited, first, last, tick, isChosen, needle, isFound, position, size, deeds } = props;
  const [isWhole, setWhole] = useState(false);
  const cut = text === undefined ? undefined : cutOff(text);
  const isCut = cut !== undefined && text !== undefined && cut.length < text.length;
  const isJumbo = text !== undefined && isEmojiOnly(text);
  const name = ['message', mine ? 'is-mine' : 'is-theirs', first && 'is-first', last && 'is-last', failure !== undefined && 'is-failed', isFound && 'is-found', isJumbo && 'is-jumbo']
    .filter(Boolean)
    .join(' ');
  return (
    <li class={name} data-key={rowKey} data-seq={props.seq} aria-posinset={position} aria-setsize={size} tabIndex={isChosen ? 0 : -1}>
      <span class="for-ears">{mine ? texts.message.you : from}: </span>
      <div class="message-line">
        <div class="bubble">
          {text === undefined ? (
            <p class="words is-unsent">{texts.message.unsent}</p>
          ) : isVisible(text) ? (
            <Words text={isCut && !isWhole ? `${cut}…` : text} needle={needle} />
          ) : (
            <p class="words is-unsent">{texts.message.invisible}</p>
          )}
          {isCut && (
            <button
              type="button"
              class="link-button"
              tabIndex={isChosen ? 0 : -1}
              aria-expanded={isWhole}
              onClick={() => {
                deeds.hold(rowKey);
                setWhole(!isWhole);
              }}
            >
              {isWhole ? texts.message.less : texts.message.all}
            </button>
          )}
          <span class="message-foot">
            {isEdited && <span class="message-edited">{texts.message.edited}</span>}
            <time dateTime={new Date(at).toISOString()} title={exactly(at)}>
              {timeOf(at)}
            </time>
            {tick && text !== undefined && (
              <span class="message-tick" title={texts.message.ticks[tick]}>
                <TickIcon tick={tick} />
                <span class="for-ears">{texts.message.ticks[tick]}</span>
              </span>
            )}
          </span>
        </div>
        <Menu label={texts.message.actions} class="message-menu" tabIndex={isChosen ? 0 : -1} items={() => itemsOf(props)}>
          <Icon name="dots" />
        </Menu>
      </div>
      {failure !== undefined && (
        <p class="message-failure">
          <span>
            {texts.message.notSent}: <bdi>{failure}</bdi>
          </span>
          <button type="button" class="link-button" tabIndex={isChosen ? 0 : -1} onClick={() => props.outgoingId !== undefined && deeds.retry(props.outgoingId)}>
            {texts.message.retry}
          </button>
        </p>
      )}
    </li>
  );
});

function itemsOf({ mine, text, seq, outgoingId, failure, deeds }: MessageProps): (Item | 'line')[] {
  const items: (Item | 'line')[] = [];
  if (text !== undefined) {
    items.push({ text: texts.message.copy, onPick: () => deeds.copy(text) });
    items.push({ text: texts.message.quote, onPick: () => deeds.quote(text) });
  }
  if (seq === undefined) {
    if (outgoingId !== undefined && failure !== undefined) {
      items.push('line', { text: texts.message.retry, onPick: () => deeds.retry(outgoingId) });
      items.push({ text: texts.message.discard, danger: true, onPick: () => deeds.discard(outgoingId) });
    }
    return items;
  }
  if (mine && text !== undefined) items.push({ text: texts.message.edit, onPick: () => deeds.edit(seq) });
  if (items.length > 0) items.push('line');
  if (mine && text !== undefined) items.push({ text: texts.message.unsend, danger: true, onPick: () => deeds.unsend(seq) });
  items.push({ text: texts.message.remove, danger: true, onPick: () => deeds.remove(seq) });
  return items;
}

/** Lines that begin with `> ` are what somebody else said. */
const Words = memo(({ text, needle }: { text: string; needle: string }) => (
  <>
    {blocksOf(text).map((block, at) =>
      block.isQuote ? (
        <blockquote key={at} class="words" dir="auto">
          <Pieces text={block.text} needle={needle} />
        </blockquote>
      ) : (
        <p key={at} class="words" dir="auto">
          <Pieces text={block.text} needle={needle} />
        </p>
      ),
    )}
  </>
));

function Pieces({ text, needle }: { text: string; needle: string }): JSX.Element {
  return <>{marked(linksOf(text), lower(needle)).map(pieceOf)}</>;
}

function pieceOf({ text, href, found }: Piece, at: number): JSX.Element | string {
  const words = found ? <mark key={at}>{text}</mark> : text;
  if (href === undefined) return words;
  return (
    <a key={at} href={href} target="_blank" rel="noopener noreferrer nofollow" title={href}>
      {words}
    </a>
  );
}

export function blocksOf(text: string): { text: string; isQuote: boolean }[] {
  if (!text.includes('> ')) return [{ text, isQuote: false }];
  const blocks: { lines: string[]; isQuote: boolean }[] = [];
  for (const line of text.split('\n')) {
    const isQuote = line.startsWith('> ');
    const lastBlock = blocks.at(-1);
    const words = isQuote ? line.slice(2) : line;
    if (lastBlock?.isQuote === isQuote) lastBlock.lines.push(words);
    else blocks.push({ lines: [words], isQuote });
  }
  return blocks
    .map(({ lines, isQuote }) => ({ text: lines.join('\n').replace(/^\n+|\n+$/g, ''), isQuote }))
    .filter(({ text }) => text !== '');
}

export function cutOff(text: string): string {
  let end = text.length > SHOWN_MAX ? SHOWN_MAX : text.length;
  let line = 0;
  for (let at = text.indexOf('\n'); at >= 0 && at < end; at = text.indexOf('\n', at + 1)) {
    line += 1;
    if (line === LINES_MAX) end = at;
  }
  // A pair of surrogates stays together, and what is almost all is all.
  if (text.length - end < 80 && line < LINES_MAX) return text;
  const code = text.charCodeAt(end - 1);
  return text.slice(0, code >= 0xd800 && code < 0xdc00 ? end - 1 : end);
}
