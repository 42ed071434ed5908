//! The messages of a conversation, as many as there are, in a bounded number of elements.
//!
//! Where the view stands is an anchor: the list's end, or a row and where it is. Whatever changes, the anchor stays where it is on the screen. The list grows
//! upwards (`column-reverse`), so that what is put on top moves nothing. It is put there when nothing scrolls: browsers animate a scroll to where it was
//! going, counted from the old top.

import type { JSX } from 'preact';
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from 'preact/hooks';

import { dayName, dayOf, now } from '../format';
import { unreadCount, type Conversation } from '../model/conversation';
import { rowsOf, tickOf, type Row } from '../model/rows';
import { place } from '../model/timeline';
import { Heights, distanceOf, indexAt, spanOf } from '../model/span';
import type { Chat } from '../session';
import { texts } from '../texts';
import { Icon } from './icons';
import { Message, propsOf, type Deeds } from './message';

/** Drawn beyond the view on either side. */
const MARGIN_PX = 700;
/** Another page is asked for when so many rows are left above what is drawn. */
const AHEAD = 60;
/** After the last scroll event of a movement. */
const SCROLLED_MS = 150;
/** Of what a message is probably high. */
const ROW_PX = 46;
/** Nearer to the end than that is at the end. */
const END_PX = 3;
const AWAY_PX = 240;

/** `offset`: from the row's edge to the same edge of the view, inwards. */
type Anchor = 'end' | { key: string; edge: 'top' | 'bottom'; offset: number };

interface Props {
  chat: Chat;
  of: Conversation;
  me: string;
  isConnected: boolean;
  needle: string;
  /** The seq of the match that is shown. */
  found: number | undefined;
  deeds: Omit<Deeds, 'hold'>;
}

type Shown = Row | { kind: 'top'; key: 'top' };

export function Timeline({ chat, of: whole, me, isConnected, needle, found, deeds }: Props): JSX.Element {
  const { peer } = whole;
  const floor = useRef(0);
  const scrolling = useRef<ReturnType<typeof setTimeout>>();
  const first = whole.timeline?.entries[0]?.seq ?? 0;
  // Earlier entries wait until nothing scrolls.
  if (scrolling.current === undefined || first > floor.current) floor.current = first;
  const isWaiting = first < floor.current;
  const of = useMemo(() => (isWaiting ? from(whole, floor.current) : whole), [whole, isWaiting]);
  const { timeline } = of;
  const scroller = useRef<HTMLDivElement>(null);
  const list = useRef<HTMLOListElement>(null);
  const heights = useRef(new Heights(ROW_PX)).current;
  const anchor = useRef<Anchor>('end');
  const focus = useRef<string>();
  const hadLine = useRef(false);
  /** Where the view was last, how high the list was, from which entry on; and by how much it has grown upwards since anything scrolled. */
  const was = useRef({ top: 0, height: 0, first: 0, grown: 0 }).current;
  const [chosen, choose] = useState<string>();
  const [failure, setFailure] = useState<string>();
  const [isAway, setAway] = useState(false);
  const [, redraw] = useReducer<number, void>((count) => count + 1, 0);

  const rows = useMemo<Shown[]>(
    () => [{ kind: 'top', key: 'top' }, ...rowsOf(of, me, dayOf)],
    [of.timeline, of.outgoing, of.unreadAfter, me],
  );
  const keys = useMemo(() => rows.map(({ key }) => key), [rows]);
  const places = useMemo(() => new Map(keys.map((key, at) => [key, at])), [keys]);
  const lastMessage = keys.length > 1 ? keys.at(-1) : undefined;
  const tabStop = chosen !== undefined && places.has(chosen) ? chosen : lastMessage;

  const unread = unreadCount(of);
  // What is new begins at the top of the view, or all of it is in the view. A line that comes with earlier messages is above what was read already.
  const hasLine = places.has('unread');
  if (hasLine && !hadLine.current && unread > 0 && anchor.current === 'end') anchor.current = { key: 'unread', edge: 'top', offset: 24 };
  hadLine.current = hasLine;

  const view = scroller.current?.clientHeight ?? 900;
  const span = spanOf(keys, heights, distanceNow(), view, MARGIN_PX);

  /** From the list's end to the lower edge of the view, as far as the heights are known. */
  function distanceNow(): number {
    const at = anchor.current;
    if (at === 'end') return 0;
    const index = places.get(at.key);
    if (index === undefined) return Math.max(0, -(scroller.current?.scrollTop ?? 0));
    const lower = distanceOf(keys, heights, index);
    const distance = at.edge === 'bottom' ? lower - at.offset : lower + heights.get(at.key) + at.offset - view;
    return Math.max(0, distance);
  }

  function rowElement(key: string): HTMLElement | undefined {
    for (const child of list.current?.children ?? []) if ((child as HTMLElement).dataset['key'] === key) return child as HTMLElement;
    return undefined;
  }

  const missesRows = () => {
    const next = spanOf(keys, heights, Math.max(0, -(scroller.current?.scrollTop ?? 0)), view, MARGIN_PX / 2);
    return next.first < span.first || next.end > span.end;
  };

  const look = () => {
    const element = scroller.current;
    if (!element) return;
    const lower = element.getBoundingClientRect().bottom + 8;
    for (let at = span.end - 1; at >= span.first; at -= 1) {
      const row = rows[at];
      if (row?.kind !== 'message' || row.mine || !row.entry) continue;
      const rect = rowElement(row.key)?.getBoundingClientRect();
      if (rect && rect.bottom <= lower) return chat.seen(peer, row.entry.seq);
    }
  };

  /** For those who ask later, when it is about other rows. */
  const lookNow = useRef(look);
  lookNow.current = look;

  const loadMore = () => {
    if (!timeline?.earlier || isWaiting || span.first > AHEAD || failure !== undefined) return;
    chat.loadEarlier(peer).catch((error: unknown) => setFailure(error instanceof Error ? error.message : texts.timeline.failed));
  };

  const onScroll = () => {
    const element = scroller.current;
    if (!element) return;
    // A scroll that began just as the list grew is carried on from the top, and is as much too far as was put there.
    if (was.grown > view && Math.abs(element.scrollTop - was.top + was.grown) < view) element.scrollTop += was.grown;
    // Browsers tell of a scroll when the list has grown, too: the line stays, if it was that.
    const isStill = was.top >= -END_PX && anchor.current !== 'end' && anchor.current.key === 'unread';
    was.top = element.scrollTop;
    const distance = Math.max(0, -element.scrollTop);
    if (distance <= END_PX) {
      if (!isStill) anchor.current = 'end';
    } else {
      const key = keys[indexAt(keys, heights, distance)];
      const row = key === undefined ? undefined : rowElement(key);
      if (key === undefined) return;
      const offset = row
        ? element.getBoundingClientRect().bottom - row.getBoundingClientRect().bottom
        : distanceOf(keys, heights, places.get(key) as number) - distance;
      anchor.current = { key, edge: 'bottom', offset };
    }
    setAway(distance > AWAY_PX);
    if (missesRows()) redraw();
    look();
    clearTimeout(scrolling.current);
    scrolling.current = setTimeout(() => {
      scrolling.current = undefined;
      was.grown = 0;
      redraw();
    }, SCROLLED_MS);
  };

  useLayoutEffect(() => {
    const element = scroller.current;
    if (!element || !list.current) return;
    let isOther = false;
    for (const child of list.current.children) {
      const { key } = (child as HTMLElement).dataset;
      const { height } = child.getBoundingClientRect();
      // What is not laid out has none.
      if (key !== undefined && height > 0 && heights.set(key, height)) isOther = true;
    }
    const firstShown = timeline?.entries[0]?.seq ?? 0;
    if (firstShown < was.first) was.grown += element.scrollHeight - was.height;
    was.first = firstShown;
    was.height = element.scrollHeight;
    const at = anchor.current;
    if (at === 'end') {
      if (element.scrollTop !== 0) element.scrollTop = 0;
    } else {
      const row = rowElement(at.key)?.getBoundingClientRect();
      const frame = element.getBoundingClientRect();
      if (row) {
        const off = at.edge === 'bottom' ? frame.bottom - row.bottom - at.offset : at.offset - (row.top - frame.top);
        if (Math.abs(off) > 0.5) element.scrollTop -= off;
      }
      // All that is below it is in the view: from now on it is the end that stays. Until somebody follows, the line does.
      if (row && element.scrollTop >= -END_PX && (at.key !== 'unread' || chat.isFollowing())) anchor.current = 'end';
    }
    was.top = element.scrollTop;
    if (focus.current !== undefined) {
      const row = rowElement(focus.current);
      if (row) {
        row.focus({ preventScroll: true });
        focus.current = undefined;
      }
    }
    if (isOther && missesRows()) redraw();
    loadMore();
    look();
  });

  useEffect(() => {
    const element = scroller.current;
    if (!element || !('ResizeObserver' in globalThis)) return;
    let width = element.clientWidth;
    const observer = new ResizeObserver(() => {
      if (element.clientWidth !== width) heights.clear();
      width = element.clientWidth;
      redraw();
    });
    observer.observe(element);
    if (list.current) observer.observe(list.current);
    const looked = () => lookNow.current();
    addEventListener('focus', looked);
    document.addEventListener('visibilitychange', looked);
    return () => {
      clearTimeout(scrolling.current);
      observer.disconnect();
      removeEventListener('focus', looked);
      document.removeEventListener('visibilitychange', looked);
    };
  }, []);

  useEffect(() => setFailure(undefined), [isConnected]);

  useEffect(() => {
    if (found === undefined) return;
    const row = rows.find((row) => row.kind === 'message' && row.entry?.seq === found);
    if (!row) return;
    show(row.key, false);
  }, [found]);

  // Who sends sees what is sent.
  const lastOutgoing = of.outgoing.at(-1)?.id;
  useLayoutEffect(() => {
    if (lastOutgoing === undefined) return;
    anchor.current = 'end';
    redraw();
  }, [lastOutgoing]);

  /** Brings a row into the view, if it is not, and focuses it if asked. */
  function show(key: string, isFocused: boolean): void {
    const frame = scroller.current?.getBoundingClientRect();
    const row = rowElement(key)?.getBoundingClientRect();
    if (!frame) return;
    if (!row) anchor.current = { key, edge: 'bottom', offset: frame.height / 2 };
    else if (row.top < frame.top + 8) anchor.current = { key, edge: 'top', offset: 48 };
    else if (row.bottom > frame.bottom - 8) anchor.current = { key, edge: 'bottom', offset: 24 };
    if (isFocused) focus.current = key;
    choose(key);
    redraw();
  }

  const hold = (key: string) => {
    const frame = scroller.current?.getBoundingClientRect();
    const row = rowElement(key)?.getBoundingClientRect();
    if (frame && row) anchor.current = { key, edge: 'top', offset: row.top - frame.top };
  };

  // The same object as long as what it does is the same: a row is drawn again if it is another.
  const current = useRef({ deeds, hold });
  current.current = { deeds, hold };
  const allDeeds = useMemo<Deeds>(
    () => ({
      copy: (text) => current.current.deeds.copy(text),
      quote: (text) => current.current.deeds.quote(text),
      edit: (seq) => current.current.deeds.edit(seq),
      unsend: (seq) => current.current.deeds.unsend(seq),
      remove: (seq) => current.current.deeds.remove(seq),
      retry: (id) => current.current.deeds.retry(id),
      discard: (id) => current.current.deeds.discard(id),
      hold: (key) => current.current.hold(key),
    }),
    [],
  );

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const focused = (document.activeElement as HTMLElement | null)?.closest<HTMLElement>('.message');
    const at = places.get(focused?.dataset['key'] ?? tabStop ?? '') ?? -1;
    const step = { ArrowUp: -1, ArrowDown: 1, Home: -1, End: 1 }[event.key];
    if (step !== undefined) {
      event.preventDefault();
      let to = event.key === 'Home' ? rows.length : event.key === 'End' ? -1 : at;
      if (event.key === 'Home') to = rows.findIndex(({ kind }) => kind === 'message');
      else if (event.key === 'End') to = rows.length - 1;
      else do to += step;
      while (rows[to] !== undefined && rows[to]?.kind !== 'message');
      const row = rows[to];
      if (row) show(row.key, true);
      else if (step > 0) document.querySelector<HTMLElement>('.compose textarea')?.focus();
    } else if ((event.key === 'Enter' || event.key === ' ') && event.target === focused) {
      event.preventDefault();
      focused?.querySelector<HTMLElement>('.message-menu')?.click();
    } else if (event.key === 'Escape') {
      document.querySelector<HTMLElement>('.compose textarea')?.focus();
    }
  };

  const onContextMenu = (event: MouseEvent) => {
    const target = event.target as HTMLElement;
    // Links and what is selected have the browser's menu.
    if (event.shiftKey || target.closest('a') || !(getSelection()?.isCollapsed ?? true)) return;
    const menu = target.closest('.bubble')?.parentElement?.querySelector<HTMLElement>('.message-menu');
    if (!menu) return;
    event.preventDefault();
    menu.click();
  };

  return (
    <div class="timeline">
      <div class="scroller" ref={scroller} onScroll={onScroll}>
        <ol class="messages" ref={list} aria-label={texts.timeline.label(peer)} onKeyDown={onKeyDown} onContextMenu={onContextMenu}>
          <li class="spacer" role="presentation" aria-hidden="true" style={{ height: `${span.above}px` }} />
          {rows.slice(span.first, span.end).map((row, at) => {
            switch (row.kind) {
              case 'top':
                return (
                  <li key="top" data-key="top" class="top">
                    <Top of={of} isConnected={isConnected} failure={failure} onRetry={() => setFailure(undefined)} />
                  </li>
                );
              case 'day':
                return (
                  <li key={row.key} data-key={row.key} class="day">
                    <span>{dayName(row.at, now.value)}</span>
                  </li>
                );
              case 'unread':
                return (
                  <li key="unread" data-key="unread" class="unread">
                    <span>{texts.timeline.unread}</span>
                  </li>
                );
              case 'message':
                return (
                  <Message
                    key={row.key}
                    {...propsOf(row)}
                    tick={tickOf(row, of)}
                    isChosen={row.key === tabStop}
                    needle={needle}
                    isFound={found !== undefined && row.entry?.seq === found}
                    position={span.first + at + 1}
                    size={rows.length}
                    deeds={allDeeds}
                  />
                );
            }
          })}
          <li class="spacer" role="presentation" aria-hidden="true" style={{ height: `${span.below}px` }} />
        </ol>
      </div>
      {isAway && (
        <button
          type="button"
          class="to-newest"
          onClick={() => {
            anchor.current = 'end';
            setAway(false);
            redraw();
          }}
        >
          {unread > 0 && <span class="badge" aria-hidden="true">{unread}</span>}
          <span class="for-ears">{unread > 0 ? texts.timeline.newestCount(unread) : texts.timeline.newest}</span>
          <Icon name="down" />
        </button>
      )}
    </div>
  );
}

/** Without what is before the entry. */
function from(of: Conversation, seq: number): Conversation {
  const { timeline } = of;
  if (!timeline) return of;
  return { ...of, timeline: { ...timeline, entries: timeline.entries.slice(place(timeline.entries, seq)), earlier: true } };
}

function Top({ of, isConnected, failure, onRetry }: { of: Conversation; isConnected: boolean; failure: string | undefined; onRetry: () => void }): JSX.Element | null {
  const { peer, timeline } = of;
  if (failure !== undefined) {
    return (
      <p class="top-text">
        {failure}{' '}
        {isConnected && (
          <button type="button" class="link-button" onClick={onRetry}>
            {texts.connection.now}
          </button>
        )}
      </p>
    );
  }
  if (!timeline || timeline.earlier) return <p class="top-text">{isConnected ? texts.timeline.loading : texts.timeline.offlineEnd}</p>;
  if (timeline.entries.length === 0) return of.outgoing.length > 0 ? null : <p class="top-text top-empty">{texts.timeline.empty(peer)}</p>;
  return <p class="top-text">{texts.timeline.beginning(peer)}</p>;
}
