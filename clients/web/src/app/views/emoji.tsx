//! A small choice of emoji; for all the others there is the system's. It is loaded when it is asked for.

import type { JSX } from 'preact';
import { useLayoutEffect, useRef } from 'preact/hooks';

import { texts } from '../texts';

const GROUPS: Record<keyof typeof texts.emoji.groups, string> = {
  faces: '😀 😄 😂 🤣 😊 🙂 😉 😍 😘 😋 😎 🤓 🤩 🥳 😏 😌 🤔 🤨 😐 🙄 😬 😮 😲 🥺 😢 😭 😤 😡 🤯 😱 🥶 😴 🤒 🤗 🫣 🫡 😇 🤠 👻 💩',
  hands: '👍 👎 👌 🤞 🤙 👋 🙌 👏 🙏 💪 🤝 ✌️ 👀 🧠 💃 🕺 🤷 🤦 🙋 👶 👨‍👩‍👧 🧑‍💻',
  nature: '🐶 🐱 🦊 🐻 🐼 🐸 🐝 🦋 🌳 🌵 🌸 🌻 🌞 🌙 ⭐ 🌈 ⛄ 🔥 🍎 🍓 🍕 🍔 🍰 🎂 ☕ 🍵 🍺 🍷',
  things: '❤️ 🧡 💛 💚 💙 💜 🖤 💔 💯 ✨ 🎉 🎁 🎈 ⚽ 🎸 🎧 📷 💻 📱 💡 🔑 📌 ✏️ 📚 ⏰ 🚗 ✈️ 🚀 🏠 ✅ ❌ ❓ ❗ ⚠️',
};

const COLUMNS = 8;

export function Picker({ onPick, onClose }: { onPick: (emoji: string) => void; onClose: () => void }): JSX.Element {
  const root = useRef<HTMLDivElement>(null);

  useLayoutEffect(() => {
    root.current?.querySelector<HTMLElement>('button')?.focus();
    const elsewhere = (event: Event) => {
      const area = root.current?.parentElement;
      if (area && !area.contains(event.target as Node)) onClose();
    };
    addEventListener('pointerdown', elsewhere);
    return () => removeEventListener('pointerdown', elsewhere);
  }, []);

  const onKeyDown = (event: KeyboardEvent) => {
    const all = [...(root.current?.querySelectorAll<HTMLElement>('button') ?? [])];
    const at = all.indexOf(document.activeElement as HTMLElement);
    const isRtl = getComputedStyle(root.current as Element).direction === 'rtl';
    const side = isRtl ? -1 : 1;
    const to = { ArrowRight: at + side, ArrowLeft: at - side, ArrowDown: at + COLUMNS, ArrowUp: at - COLUMNS }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      all[Math.min(Math.max(to, 0), all.length - 1)]?.focus();
    } else if (event.key === 'Escape') {
      event.stopPropagation();
      onClose();
    }
  };

  return (
    <div class="emoji" ref={root} role="group" aria-label={texts.emoji.label} onKeyDown={onKeyDown}>
      {(Object.keys(GROUPS) as (keyof typeof GROUPS)[]).map((group, at) => (
        <section key={group} aria-label={texts.emoji.groups[group]}>
          <h2>{texts.emoji.groups[group]}</h2>
          <div class="emoji-grid">
            {GROUPS[group].split(' ').map((emoji, place) => (
              <button key={emoji} type="button" tabIndex={at === 0 && place === 0 ? 0 : -1} onClick={() => onPick(emoji)}>
                {emoji}
              </button>
            ))}
          </div>
        </section>
      ))}
    </div>
  );
}
