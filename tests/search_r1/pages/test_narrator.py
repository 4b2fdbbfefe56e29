"""What a playground is told of the text that is being written."""

from types import SimpleNamespace

from search_r1.pages.play_model import Ask, Narrator


def test_a_text_is_told_once_and_characters_whole(tokenizer):
    session = SimpleNamespace(tokenizer=tokenizer, log_probs=False)
    narrator = Narrator(session, Ask(question="Who?"))
    texts = ["Søren 🜚 Zürich", "an answer"]
    for call, text in enumerate(texts, start=1):
        ids = tokenizer.encode(text, add_special_tokens=False)
        shown = ""
        for count in range(1, len(ids) + 1):
            narrator.on_tokens(call, ids[:count])
            _, event = narrator.events.get_nowait()
            assert event["goes_on"] == (count > 1), "what was sent is not sent again"
            shown += event["text"]
            assert text.startswith(shown)
        assert shown == text
