# make demo · make test · make docs · make bench · make gpu · make asan · make compat · make lint
PYTHON ?= python3
PIP := --quiet --disable-pip-version-check

.PHONY: demo test test-full docs bench gpu asan compat lint wheel clean
.DELETE_ON_ERROR:
.PRECIOUS: .venv/%/installed

# Two environments: the tests' torchvision has no CPU build, and a torchvision that does not import breaks transformers.
.venv/%/installed: requirements-%.txt
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/pip install $(PIP) torch==2.13.0
	.venv/$*/bin/pip install $(PIP) -r requirements-$*.txt
	touch $@

# The editable install: python started here must not import a source tree without its libraries.
SOURCES := $(shell find csrc triton_kernels vitkern -type f -not -name '*.so' -not -name '*.pyc') setup.py pyproject.toml

.venv/%/built: .venv/%/installed $(SOURCES)
	VITKERN_BUILD_CUDA=$(CUDA) .venv/$*/bin/pip install $(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: CUDA ?= 0
demo: .venv/demo/built
	.venv/demo/bin/vitkern demo --out demo

# One architecture: the emulator runs the CUDA kernels here; a wheel has all of them (setup.py).
test: CUDA ?= auto
test: export TORCH_CUDA_ARCH_LIST ?= 9.0a
# One thread per worker: threads of two workers that wait for each other on the same cores double the time.
test: export OMP_NUM_THREADS ?= 1
test: .venv/test/built
	.venv/test/bin/ruff check .
	.venv/test/bin/python -m pytest -q -n auto --dist worksteal

# The figures are drawn by the definitions, so the pages need no compiler.
docs: export VITKERN_BUILD_CPU = 0
docs: CUDA ?= 0
docs: .venv/docs/built
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --quiet
	@echo "The site is in build/site: open build/site/index.html"

test-full: CUDA ?= auto
test-full: export OMP_NUM_THREADS ?= 1
test-full: .venv/test/built
	VITKERN_FULL=1 VITKERN_FUZZ=500 .venv/test/bin/python -m pytest -q -n auto --dist worksteal

bench: CUDA ?= 0
bench: .venv/test/built
	.venv/test/bin/vitkern bench

# Runs where the device is, in the environment at hand: correctness, sanitizer, benchmark. SECTION=window,merge resumes.
SECTION ?= all
OUT ?= benchmarks/results
gpu:
	$(PYTHON) benchmarks/gpu.py --section $(SECTION) --out $(OUT)

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with the stock torch. Python looks for modules where
# it is started before it looks anywhere else: in the sanitized tree.
ASAN_TESTS := ops window_attention window_options window_groups window_hidden attention_varlen attention_scattered mask_from_logits \
  bipartite_match \
  merge_plan merge_tokens unmerge_tokens \
  select_tokens restore_tokens drop_tokens cluster_tokens cluster_tokens_methods cluster_kmeans reconstruct_tokens soft_merge \
  linear_attention linear_decay channel_attention selective_scan deformable_attention \
  neighborhood_attention sampled_window_attention depthwise_value
asan: CUDA ?= 0
asan: .venv/test/built
	rm -rf build/asan-tree && mkdir -p build/asan-tree && cp -r csrc vitkern triton_kernels setup.py pyproject.toml README.md LICENSE build/asan-tree/
	cd build/asan-tree && VITKERN_SANITIZE=1 VITKERN_BUILD_CUDA=0 ../../.venv/test/bin/python setup.py -q build_ext --inplace
	cd build/asan-tree && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 \
	../../.venv/test/bin/python -m pytest -q $(ASAN_TESTS:%=../../tests/test_%.py) \
	  -k "not gradcheck and not compile and not beyond_32 and not memory and not no_matrix"

# A source distribution, and from it, in isolation, the one wheel; torch for the build is that for CPUs.
wheel: CUDA ?= auto
wheel: .venv/test/installed
	PIP_CONSTRAINT=$(CURDIR)/constraints-cpu.txt VITKERN_BUILD_CUDA=$(CUDA) .venv/test/bin/python -m build --outdir dist
	ls -l dist

# The built wheel on the oldest and the newest torch and Python: large downloads, so not part of make test.
compat: wheel
	for pair in 3.10:2.10.0 3.13:$(or $(NEWEST),2.15.0); do \
	  version=$${pair#*:}; python$${pair%:*} -m venv build/compat-$$version && \
	  build/compat-$$version/bin/pip install --quiet torch==$$version numpy && \
	  build/compat-$$version/bin/pip install --quiet --force-reinstall --no-deps dist/vitkern-*.whl && \
	  (cd build && compat-$$version/bin/python ../tests/compat.py) || exit 1; \
	done

lint: .venv/test/installed
	.venv/test/bin/ruff check . && .venv/test/bin/ruff format --check . && .venv/test/bin/mypy

clean:
	rm -rf build dist demo vitkern/*.so *.egg-info
