// The Python module vittle_kernels._native: addresses, strides and sizes in, no torch header anywhere. What the
// tensors are is vittle_kernels/backends/native.py's business; sizes are checked once more here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#if defined(VITTLE_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace vittle {
namespace {

using Address = uintptr_t;
using RowsTuple = std::tuple<Address, int64_t, int64_t, int64_t>;  // data, inner, outer_stride, inner_stride

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_of(const RowsTuple& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2");
  return static_cast<DType>(code);
}

// Where to run: device -1 is the CPU with a number of threads, else a CUDA device with a stream.
struct Target {
  int device;
  Address stream;
  int threads;
};

void fill(Problem& p, int64_t tokens, int64_t width, std::optional<double> bound, Address alpha, Address seed,
          Address rows, Address prior, Address offsets, int64_t groups, int hidden_type, int posterior_type,
          const RowsTuple& posterior) {
  if (tokens < 0 || width < 1 || groups < 1) throw std::invalid_argument("need tokens >= 0, width >= 1, groups >= 1");
  if (groups > 1 && !offsets) throw std::invalid_argument("several groups need offsets");
  p.tokens = tokens;
  p.width = width;
  p.bound = bound ? static_cast<float>(*bound) : std::numeric_limits<float>::infinity();
  p.alpha = pointer<const float>(alpha);
  p.seed = pointer<const int64_t>(seed);
  p.rows = pointer<const int64_t>(rows);
  p.prior = pointer<const float>(prior);
  p.offsets = pointer<const int32_t>(offsets);
  p.groups = groups;
  p.hidden_type = dtype_of(hidden_type);
  p.posterior_type = dtype_of(posterior_type);
  p.posterior = rows_of(posterior);
}

template <typename CpuCall, typename CudaCall>
void run(const Target& target, CpuCall&& on_cpu, CudaCall&& on_cuda) {
  const py::gil_scoped_release release;
  if (target.device < 0) {
    on_cpu(cpu::kernels());
    return;
  }
#if defined(VITTLE_CUDA)
  on_cuda(cuda::Launch{target.device, pointer<void>(target.stream)});
#else
  throw std::runtime_error("this build has no CUDA kernels");
#endif
}

#if defined(VITTLE_CUDA)
#define VITTLE_ON_CUDA(call) [&](cuda::Launch launch) { cuda::call; }
#else
#define VITTLE_ON_CUDA(call) nullptr
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels of vittle_kernels.";

  py::class_<Target>(m, "Target")
      .def(py::init<int, Address, int>(), py::arg("device"), py::arg("stream"), py::arg("threads"));

  m.def(
      "forward",
      [](const Target& target, int64_t tokens, int64_t width, std::optional<double> bound, Address alpha, Address seed,
         Address rows, Address prior, Address offsets, int64_t groups, int hidden_type, int posterior_type,
         const RowsTuple& posterior, const RowsTuple& hidden, Address out, Address kl) {
        Forward f{};
        fill(f, tokens, width, bound, alpha, seed, rows, prior, offsets, groups, hidden_type, posterior_type,
             posterior);
        f.hidden = rows_of(hidden);
        f.out = pointer<void>(out);
        f.kl = pointer<float>(kl);
        const auto on_cpu = [&](const cpu::Kernels& k) {
          cpu::prefer_huge_pages(f.out, tokens * width * size_of(f.hidden_type));
          k.forward(f, target.threads);
        };
        run(target, on_cpu, VITTLE_ON_CUDA(forward(f, launch)));
      });

  m.def(
      "backward",
      [](const Target& target, int64_t tokens, int64_t width, std::optional<double> bound, Address alpha, Address seed,
         Address rows, Address prior, Address offsets, int64_t groups, int hidden_type, int posterior_type,
         const RowsTuple& posterior, const RowsTuple& grad_out, Address grad_kl, Address grad_hidden,
         Address grad_posterior, Address partials, Address grad_prior) {
        Backward b{};
        fill(b, tokens, width, bound, alpha, seed, rows, prior, offsets, groups, hidden_type, posterior_type,
             posterior);
        if (prior && !(partials && grad_prior)) throw std::invalid_argument("a prior needs partials and grad_prior");
        b.grad_out = rows_of(grad_out);
        b.grad_kl = pointer<const float>(grad_kl);
        b.grad_hidden = pointer<void>(grad_hidden);
        b.grad_posterior = pointer<void>(grad_posterior);
        b.partials = pointer<float>(partials);
        b.grad_prior = pointer<float>(grad_prior);
        const auto on_cpu = [&](const cpu::Kernels& k) {
          cpu::prefer_huge_pages(b.grad_hidden, tokens * width * size_of(b.hidden_type));
          cpu::prefer_huge_pages(b.grad_posterior, 2 * tokens * width * size_of(b.posterior_type));
          k.backward(b, target.threads);
        };
        run(target, on_cpu, VITTLE_ON_CUDA(backward(b, launch)));
      });

  m.def("max_row_blocks", [](int64_t tokens, int64_t groups) {
    Problem p{};
    p.tokens = tokens;
    p.groups = groups;
    return max_row_blocks(p);
  });

  m.def("philox", [](const Target& target, int64_t seed, Address counters, Address words, int64_t count) {
    const auto* c = pointer<const uint32_t>(counters);
    auto* w = pointer<uint32_t>(words);
    run(target, [&](const cpu::Kernels& k) { k.philox(seed, c, w, count); },
        VITTLE_ON_CUDA(philox(seed, c, w, count, launch)));
  });
  m.def("normals", [](const Target& target, Address words, Address eps, int64_t count) {
    const auto* w = pointer<const uint32_t>(words);
    auto* e = pointer<float>(eps);
    run(target, [&](const cpu::Kernels& k) { k.normals(w, e, count); }, VITTLE_ON_CUDA(normals(w, e, count, launch)));
  });
  m.def("exponentials", [](const Target& target, Address x, Address y, int64_t count) {
    const auto* in = pointer<const float>(x);
    auto* out = pointer<float>(y);
    run(target, [&](const cpu::Kernels& k) { k.exponentials(in, out, count); },
        VITTLE_ON_CUDA(exponentials(in, out, count, launch)));
  });

  m.def("instruction_set", [] { return cpu::kernels().instruction_set; });
  m.def("select_instruction_set", &cpu::select_instruction_set, py::arg("name"));

#if defined(VITTLE_CUDA)
  m.attr("cuda_architectures") = VITTLE_CUDA_ARCHITECTURES;
  m.attr("cuda_version") = VITTLE_CUDA_VERSION;
  m.def("why_cuda_unavailable", &cuda::why_unavailable, py::arg("device") = -1);
#else
  m.attr("cuda_architectures") = py::none();
  m.attr("cuda_version") = py::none();
#endif
}

}  // namespace vittle
