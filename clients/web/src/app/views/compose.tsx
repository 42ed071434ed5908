//! Where a message is written, or given other words.

import type { JSX } from 'preact';
import { useLayoutEffect, useRef, useState } from 'preact/hooks';

import type { Conversation } from '../model/conversation';
import { bytesOf } from '../model/words';
import type { Chat } from '../session';
import { texts } from '../texts';
import { Icon } from './icons';
import type { Picker } from './emoji';

const HEIGHT_MAX_PX = 220;

/** A keyboard on the screen comes and goes with the focus, and its Enter is a new line. Who has no pointer at all has a real one. */
const isTouched = (): boolean => matchMedia('(pointer: coarse)').matches;

interface Props {
  chat: Chat;
  of: Conversation;
  me: string;
  draft: string;
  messageBytes: number;
}

export function Compose({ chat, of, me, draft, messageBytes }: Props): JSX.Element {
  const { peer, editing } = of;
  const field = useRef<HTMLTextAreaElement>(null);
  const [EmojiPicker, setPicker] = useState<{ view: typeof Picker }>();
  const [isPicking, setPicking] = useState(false);
  const text = editing ? editing.text : draft;
  const bytes = text.length * 3 > messageBytes ? bytesOf(text) : 0;
  const isTooLong = bytes > messageBytes;

  useLayoutEffect(() => {
    const element = field.current;
    if (!element) return;
    element.style.height = 'auto';
    element.style.height = `${Math.min(element.scrollHeight, HEIGHT_MAX_PX)}px`;
  }, [text, peer]);

  useLayoutEffect(() => {
    const element = field.current;
    if (!element || (editing === undefined && isTouched())) return;
    element.focus({ preventScroll: true });
    element.setSelectionRange(element.value.length, element.value.length);
  }, [peer, editing?.seq]);

  const write = (words: string) => (editing ? chat.editDraft(peer, words) : chat.draft(peer, words));

  const submit = () => {
    // What is in the field, even if it is not drawn yet.
    const words = field.current?.value ?? text;
    if (editing) {
      const old = of.timeline?.entries.find(({ seq }) => seq === editing.seq)?.text;
      chat.editDraft(peer, words);
      if (words === old || words.trim() === '') chat.stopEditing(peer);
      else void chat.saveEdit(peer);
    } else if (chat.send(peer, words)) {
      chat.draft(peer, '');
    }
    field.current?.focus();
  };

  const put = (words: string) => {
    const element = field.current;
    const [from, to] = element ? [element.selectionStart, element.selectionEnd] : [text.length, text.length];
    write(text.slice(0, from) + words + text.slice(to));
    requestAnimationFrame(() => element?.setSelectionRange(from + words.length, from + words.length));
  };

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.isComposing) return;
    if (event.key === 'Enter' && !event.shiftKey && !event.altKey && !isTouched()) {
      event.preventDefault();
      submit();
    } else if (event.key === 'Escape') {
      if (isPicking) setPicking(false);
      else if (editing) chat.stopEditing(peer);
      else return;
      event.stopPropagation();
    } else if (event.key === 'ArrowUp' && text === '' && !editing) {
      const last = of.timeline?.entries.findLast((entry) => entry.from === me && entry.text !== undefined);
      if (!last) return;
      event.preventDefault();
      chat.startEditing(peer, last.seq);
    }
  };

  const pick = async () => {
    if (!EmojiPicker) {
      try {
        const { Picker: view } = await import('./emoji');
        setPicker({ view });
      } catch {
        return chat.tell(texts.connection.offline);
      }
    }
    setPicking(!isPicking);
  };

  const closePicker = () => {
    setPicking(false);
    field.current?.focus();
  };

  return (
    <footer class="compose">
      {editing && (
        <div class="compose-editing">
          <span>{texts.compose.editing}</span>
          <button type="button" class="round round-small" aria-label={texts.compose.stopEditing} onClick={() => chat.stopEditing(peer)}>
            <Icon name="close" />
          </button>
        </div>
      )}
      {isTooLong && (
        <p class="compose-problem" role="alert">
          {texts.compose.tooLong(bytes, messageBytes)}
        </p>
      )}
      <form
        class="compose-row"
        onSubmit={(event) => {
          event.preventDefault();
          submit();
        }}
      >
        <div class="compose-field">
          <textarea
            ref={field}
            rows={1}
            value={text}
            dir="auto"
            aria-label={texts.compose.label(peer)}
            placeholder={texts.compose.placeholder}
            enterkeyhint="send"
            onInput={(event) => write(event.currentTarget.value)}
            onKeyDown={onKeyDown}
          />
          <button type="button" class="round" aria-label={texts.compose.emoji} aria-expanded={isPicking} onClick={() => void pick()}>
            <Icon name="smile" />
          </button>
          {isPicking && EmojiPicker && <EmojiPicker.view onPick={put} onClose={closePicker} />}
        </div>
        <button type="submit" class="send" aria-label={editing ? texts.compose.save : texts.compose.send} disabled={isTooLong || (text.trim() === '' && !editing)}>
          <Icon name={editing ? 'check' : 'send'} />
        </button>
      </form>
    </footer>
  );
}
