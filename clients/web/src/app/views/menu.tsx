//! A button with a menu: arrow keys go through it, Esc and a click elsewhere close it, and the focus goes back to the button.

import type { ComponentChildren, JSX } from 'preact';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';

export interface Item {
  text: string;
  danger?: boolean;
  /** One of several, and whether it is the one. */
  checked?: boolean;
  onPick: () => void;
}

const GAP_PX = 6;

interface Props {
  label: string;
  class?: string;
  items: () => readonly (Item | 'line')[];
  children: ComponentChildren;
  tabIndex?: number;
}

export function Menu({ label, class: name = 'round', items, children, tabIndex }: Props): JSX.Element {
  const [isOpen, setOpen] = useState(false);
  const button = useRef<HTMLButtonElement>(null);
  const list = useRef<HTMLDivElement>(null);

  const close = (refocus: boolean) => {
    setOpen(false);
    if (refocus) button.current?.focus();
  };

  useLayoutEffect(() => {
    if (!isOpen || !list.current || !button.current) return;
    const from = button.current.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = list.current;
    const isBelow = from.bottom + GAP_PX + height < innerHeight || from.top < height + GAP_PX;
    const top = isBelow ? Math.min(from.bottom + GAP_PX, innerHeight - height - GAP_PX) : from.top - GAP_PX - height;
    const isEnd = from.left + from.width / 2 > innerWidth / 2;
    const left = isEnd ? from.right - width : from.left;
    list.current.style.top = `${Math.max(GAP_PX, top)}px`;
    list.current.style.left = `${Math.min(Math.max(GAP_PX, left), innerWidth - width - GAP_PX)}px`;
    list.current.querySelector<HTMLElement>('[role^=menuitem]')?.focus({ preventScroll: true });
  }, [isOpen]);

  useEffect(() => {
    if (!isOpen) return;
    const elsewhere = (event: Event) => {
      const target = event.target as Node;
      if (!list.current?.contains(target) && !button.current?.contains(target)) close(false);
    };
    const moved = () => close(false);
    addEventListener('pointerdown', elsewhere);
    addEventListener('resize', moved);
    return () => {
      removeEventListener('pointerdown', elsewhere);
      removeEventListener('resize', moved);
    };
  }, [isOpen]);

  const onKeyDown = (event: KeyboardEvent) => {
    const all = [...(list.current?.querySelectorAll<HTMLElement>('[role^=menuitem]') ?? [])];
    const at = all.indexOf(document.activeElement as HTMLElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    event.stopPropagation();
    if (to !== undefined) {
      event.preventDefault();
      all[(to + all.length) % all.length]?.focus();
    } else if (event.key === 'Escape' || event.key === 'Tab') {
      event.preventDefault();
      close(true);
    }
  };

  return (
    <>
      <button
        ref={button}
        type="button"
        class={name}
        aria-label={label}
        aria-haspopup="menu"
        aria-expanded={isOpen}
        {...(tabIndex === undefined ? {} : { tabIndex })}
        onClick={() => setOpen(!isOpen)}
        onKeyDown={(event) => {
          if (event.key !== 'ArrowDown') return;
          event.preventDefault();
          event.stopPropagation();
          setOpen(true);
        }}
      >
        {children}
      </button>
      {isOpen && (
        <div ref={list} class="menu" role="menu" aria-label={label} onKeyDown={onKeyDown}>
          {items().map((item, at) =>
            item === 'line' ? (
              <div key={at} class="menu-line" role="separator" />
            ) : (
              <button
                key={at}
                type="button"
                role={item.checked === undefined ? 'menuitem' : 'menuitemradio'}
                {...(item.checked === undefined ? {} : { 'aria-checked': item.checked })}
                tabIndex={-1}
                class={item.danger ? 'menu-item danger' : 'menu-item'}
                onClick={() => {
                  close(true);
                  item.onPick();
                }}
              >
                {item.text}
              </button>
            ),
          )}
        </div>
      )}
    </>
  );
}
