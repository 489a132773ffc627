"""Print what models answer to a prompt: generate.py PROMPT FOLDER [FOLDER ...]. Stock transformers, no headwise."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

prompt, *folders = sys.argv[1:]
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(f"{folder}: {tokenizer.decode(tokens[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
