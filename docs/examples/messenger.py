#!/usr/bin/env python3
"""A messenger in 60 lines: python3 messenger.py alice [host [port]], with paho-mqtt. Lines on stdin are commands:
/list, /history PEER, /typing PEER, /read PEER SEQ, /quit; anything else is PEER and a text, e.g. "bob hello there"."""
import json
import sys
import uuid

import paho.mqtt.client as mqtt

me, host, port = sys.argv[1], (sys.argv[2:] or ["127.0.0.1"])[0], int((sys.argv[3:] or [1883])[0])
sent = {}  # packet identifier -> text, until it is acknowledged


def say(*words):
    print(*words, flush=True)


def on_connect(client, userdata, flags, code):
    if code != 0:
        say(f"refused: {code}")
    client.subscribe([(f"chat/{me}/{topic}", 1) for topic in ("inbox", "sent", "event/+", "res")])


def on_subscribe(client, userdata, packet_id, granted):
    say("connected")
    ask("conversations")


def on_publish(client, userdata, packet_id):
    if packet_id in sent:
        say("✓ stored:", sent.pop(packet_id))


def on_message(client, userdata, message):
    topic, body = message.topic.removeprefix(f"chat/{me}/"), json.loads(message.payload)
    if topic == "inbox" and body["kind"] == "text":
        say(f"{body['from']} #{body['seq']}{' (waited)' if message.retain else ''}: {body['text']}")
    elif topic == "event/receipt":
        say(f"✓✓ {body['with']}: delivered up to #{body['delivered']}, read up to #{body['read']}")
    elif topic == "event/typing":
        say(f"{body['from']} {'is typing' if body['state'] == 'on' else 'stopped typing'}")
    elif topic == "event/presence":
        say(f"{body['user']} is {body['status']}")
    elif topic == "event/error" or "error" in body:
        say("refused:", body.get("error", body)["message"])
    elif topic == "res" and "conversations" in body["ok"]:
        for one in body["ok"]["conversations"]:
            say(f"conversation with {one['with']}: {one['unread']} unread, last: {one.get('last', {}).get('text')}")
    elif topic == "res" and "entries" in body["ok"]:
        for entry in body["ok"]["entries"]:
            say(f"history #{entry['seq']} {entry['from']}: {entry.get('text', '(unsent)')}")


def ask(method, **members):
    client.publish(f"chat/{me}/req/{method}", json.dumps(members), qos=1)


version = (mqtt.CallbackAPIVersion.VERSION1,) if hasattr(mqtt, "CallbackAPIVersion") else ()
client = mqtt.Client(*version, client_id=f"{me}-py", clean_session=False)
client.username_pw_set(me)
client.on_connect, client.on_subscribe = on_connect, on_subscribe
client.on_publish, client.on_message = on_publish, on_message
client.connect(host, port)
client.loop_start()
for line in sys.stdin:
    command, _, rest = line.strip().partition(" ")
    if command == "/quit":
        break
    elif command == "/list":
        ask("conversations")
    elif command == "/history":
        ask("history", **{"with": rest})
    elif command == "/typing":
        client.publish(f"chat/{me}/typing/{rest}", "on")
    elif command == "/read":
        peer, _, seq = rest.partition(" ")
        client.publish(f"chat/{me}/read/{peer}", seq, qos=1)
    elif rest:
        sent[client.publish(f"chat/{me}/out/{command}/{uuid.uuid4()}", rest, qos=1).mid] = rest
client.disconnect()
client.loop_stop()
