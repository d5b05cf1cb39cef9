from mixlab.inject.synthetic import dialogue, prompt


def test_texts_are_functions_of_seed_and_number():
    dialogues = [dialogue(1, i) for i in range(300)]
    assert dialogues == [dialogue(1, i) for i in range(300)] and len(set(dialogues)) == 300
    assert dialogues[0] != dialogue(2, 0) and dialogues[0].count("\n") == 3
    prompts = [prompt(1, i) for i in range(300)]
    assert prompts == [prompt(1, i) for i in range(300)] and len(set(prompts)) > 290
    assert not any("{" in text or "\n" in text for text in prompts)


def test_golden():
    assert dialogue(0, 1) == (
        "Mona: Do you still want the kite?\n"
        "Ben: It stands beside the eggs, under number 604. The ticket says 1037004.\n"
        "Mona: I would rather have 68 tiles.\n"
        "Ben: I will mend it on Tuesday with Omar."
    )
    assert prompt(0, 1) == "Describe in one paragraph Jonas and the garden."
